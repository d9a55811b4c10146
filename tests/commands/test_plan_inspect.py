import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml

from fedhpc.commands import plan_memory
from fedhpc.commands.plan_memory import memory_parts, trainable
from fedhpc.commands.rehearsal import LiveBytes, longest, rehearsal
from fedhpc.config.file import load_config
from fedhpc.device.local_update import pack_gradients
from fedhpc.errors import EXIT_STOPPED
from fedhpc.exchange import LocalExchange
from fedhpc.model.backbone import Backbone
from fedhpc.model.decoding import Decoding, decode
from fedhpc.model.weight_files import stored_weights
from fedhpc.server.job import load_job


@pytest.fixture
def nothing_rehearsed(monkeypatch):
    """The work on tensors counts as none, where a plan's other numbers are looked at: it is most of a plan's time."""
    works = dict.fromkeys(("training", "evaluation", "answers", "scoring", "curriculum"), lambda *_: 0)
    work = SimpleNamespace(weights=0, prepacked=0, loading=0, **works)
    monkeypatch.setattr(plan_memory, "rehearsal", lambda job: nullcontext(work))


def test_plan_counts_bytes_parameters_and_places(fedhpc, run_config):
    config = run_config(selection__ratio=0.5)
    status, out, _ = fedhpc("plan", config, "--ranks", 5, "--examples-per-second", 10)
    assert status == 0
    per_layer = 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
    assert f"{4 * per_layer:,} parameters" in out
    assert f"{2 * per_layer:,} parameters, 2 of 4 layers" in out
    # 4 bytes a float, a header of 72 bytes down and 64 up; 4 device ranks down, with 4 bytes for each pack, and 6
    # sampled devices up.
    down, up = (copies * (4 * 2 * per_layer + header) / 1000 for copies, header in ((4, 72 + 4 * 6), (6, 64)))
    assert f"{down:.1f} kB" in out
    assert f"{up:.1f} kB" in out
    assert "rank 4: 3 devices" in out
    # 6 devices of 20 examples, one epoch, 10 examples/s on each of 4 ranks
    assert "3.0 s a round" in out
    assert not Path(yaml.safe_load(config.read_text())["run_dir"]).exists()


@pytest.mark.usefixtures("nothing_rehearsed")
@pytest.mark.parametrize(
    ("changes", "down", "up"),
    [
        ({"exchange__dtype": "bfloat16"}, lambda n: 4 * (4 * n + 72 + 4 * 6), lambda n: 6 * (2 * n + 64)),
        ({"exchange__mode": "reduce"}, lambda n: 4 * (4 * n + 72 + 4 * 6), lambda n: 2 * 8 * n + 6 * 64),
        ({"exchange__mode": "secure"}, lambda n: 4 * (4 * n + 72 + 4 * 6), lambda n: 4 * 2 * 8 * n + 6 * 64),
        ({"server__method": "scaffold"}, lambda n: 4 * (2 * 4 * n + 72 + 4 * 6), lambda n: 6 * (4 * n + 64)),
    ],
)
def test_plan_counts_the_bytes_of_each_way_to_exchange(fedhpc, run_config, changes, down, up):
    """As tests/mpi/test_ranks.py counts them in runs; sums are two of float64, for fedpeptao."""
    out = fedhpc("plan", run_config(selection__ratio=0.5, trace=False, **changes), "--ranks", 5)[1]
    found = re.search(r"^  down, broadcast .*?([\d.]+ kB).*\n  up, .*?([\d.]+ kB)", out, re.MULTILINE).groups()
    n = 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
    assert found == tuple(f"{count(n) / 1000:.1f} kB" for count in (down, up))


@pytest.mark.usefixtures("nothing_rehearsed")
def test_plan_counts_the_bytes_of_keys(fedhpc, run_config):
    """As tests/mpi/test_secure_ranks.py counts them in runs, of 6 devices."""
    out = fedhpc("plan", run_config(exchange__mode="secure", trace=False), "--ranks", 5)[1]
    down, up = 4 * (3 * 72 + 6 * (68 + 4 + 6 * 88 + 3 * 12)), 6 * (68 + 4 + 6 * 88 + 4 + 6 * 36)
    for way, count in (("down", down), ("up", up)):
        assert re.search(rf"^  {way}, keys .*?([\d.]+ kB)", out, re.MULTILINE)[1] == f"{count / 1000:.1f} kB"


@pytest.mark.usefixtures("nothing_rehearsed")
def test_plan_counts_what_methods_and_devices_need(fedhpc, run_config):
    n = 4 * 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH  # bytes of two layers' prompts, exchanged or not

    def figures(**changes):
        out = fedhpc("plan", run_config(**{"selection__ratio": 0.5, **changes}), "--ranks", 5)[1]
        return {label.strip(): number for number, label in re.findall(r"^ +([\d.]+ [kM]?B)  (.+)$", out, re.MULTILINE)}

    assert figures(server__method="fedavg")["buffer of 6 uploads"] == f"{2 * 6 * n / 1000:.1f} kB"
    twice = figures(server__method="mime", device__optimizer="sgd")  # parameters and gradients
    assert twice["buffer of 6 uploads"] == f"{2 * 6 * 2 * n / 1000:.1f} kB"
    # Three devices of a rank keep their layers, the Fisher information of these, and two moments of all layers.
    more = figures(server__method="fedavg", sparse__fraction=0.5, device__reset_moments=False)
    assert more["what devices keep"] == f"{3 * (2 * n + 2 * 2 * n) / 1000:.1f} kB"
    half_done = "device ranks together: half-done updates, prompts and Adam moments"
    assert figures()[half_done] == f"{4 * 3 * 2 * n / 1000:.1f} kB"
    assert figures(device__pack="auto")[half_done] == f"{6 * 3 * 2 * n / 1000:.1f} kB"


@pytest.fixture
def plan_job(run_config):
    """The job of a configuration with changes."""
    return lambda **changes: load_job(load_config(run_config(**changes), []))


def tensors_at_once(job, ranks=2):
    """Bytes of tensors in the plan of a device rank, and when they are needed."""
    (when, size), *_ = [
        (part, size) for part, size in memory_parts(job, ranks)["each device rank"].items() if "at once" in part
    ]
    return when, size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device__pack": 3},
        {"model__gradient_checkpointing": True},
        {"model__dtype": "bfloat16", "tuning__kind": "lora"},
        {"tuning__kind": "late_prompt", "selection__strategy": "all"},
        {"tuning__kind": "full", "selection__strategy": "all"},
        {"tuning__loss": "vocabulary"},
    ],
    ids=str,
)
def test_a_rehearsed_step_holds_the_tensors_of_a_real_one(plan_job, changes):
    """Counted twice: by what operations make, of tensors with and without numbers; and by what autograd keeps."""
    job = plan_job(**changes)
    pack = job.config.device.pack
    with rehearsal(job) as work:
        weights, rehearsed = work.weights, work.training(pack, pack)
    with LiveBytes() as live:
        backbone = Backbone(job.config.model, job.config.tuning, job.data.description, torch.device("cpu"))
    assert weights == pytest.approx(sum(p.nbytes for p in backbone.model.parameters()), rel=0.01)  # the rest: buffers
    split = job.data.split("train")
    chosen = sorted(
        (longest(split, own, job.config.device.batch_size) for own in job.partition.train),
        key=lambda batch: -len(batch) * split.lengths[batch[0]],
    )[:pack]
    batch = split.batch(np.concatenate(chosen), [len(examples) for examples in chosen])
    kept, frozen = {}, {p.untyped_storage()._cdata for p in backbone.parameters()}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step():
        params = [
            {name: torch.zeros(shape, requires_grad=True) for name, shape in job.tuning.shapes.items()} for _ in chosen
        ]
        moments = [torch.zeros_like(p) for own in params for p in own.values() for _ in range(2)]
        backbone.training_mode(True)
        pack_gradients(backbone, job.tuning, params, batch, None)
        return sum(tensor.nbytes for tensor in moments)

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        held = step()
    with live:
        real = live.during(step)
    assert rehearsed == pytest.approx(real, rel=0.02)
    assert sum(kept.values()) + held < 1.02 * rehearsed
    if not job.config.model.gradient_checkpointing:  # whose layers are kept, and let go, one at a time
        assert rehearsed < 1.5 * (sum(kept.values()) + 1.5 * held)


def test_plan_counts_what_the_largest_moment_needs(plan_job):
    (when, one), (_, three) = (tensors_at_once(plan_job(evaluate__batch_size=8, device__pack=n)) for n in (1, 3))
    assert when.startswith("training")
    assert three == pytest.approx(3 * one, rel=0.15)
    whole = plan_job(tuning__kind="full", selection__strategy="all")
    # Parameters' changes, their gradients and two moments.
    assert tensors_at_once(whole)[1] > 4 * 4 * trainable(whole)
    assert tensors_at_once(plan_job(evaluate__batch_size=1000, device__batch_size=1))[0].startswith("evaluation")
    when, second_order = tensors_at_once(plan_job(selection__ratio="auto", selection__warmup_rounds=1))
    assert when.startswith("Hessian")
    assert second_order > 2 * one
    two_places = plan_job(selection__ratio="auto", selection__auto_by="eigengap", selection__warmup_rounds=1)
    assert tensors_at_once(two_places)[1] > 1.5 * second_order
    auto = memory_parts(plan_job(device__pack="auto"), 2)
    alone, together = (sum(auto[f"each device rank, for pack {pack}"].values()) for pack in (1, 4))
    assert together - alone > 2 * one


def test_rehearsed_answers_hold_at_least_the_tensors_of_real_ones(tmp_path):
    config = tiny.write_world(tmp_path, task="generation", num_train=24, num_validation=12)
    changes = ["evaluate.max_new_tokens=40", "evaluate.generate=8", "tuning.kind=lora", "selection.strategy=all"]
    job = load_job(load_config(config, changes))
    with rehearsal(job) as work:
        rehearsed = work.answers(1)
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, torch.device("cpu"))
    prompts = job.questions.prompts
    batch = prompts.batch(np.arange(len(prompts)), [len(prompts)])
    params = {name: torch.zeros(shape) for name, shape in job.tuning.shapes.items()}
    how = Decoding(max_new_tokens=40, temperature=0.0, top_p=1.0, ends=(), pad_id=prompts.pad_id, seed=0)
    with LiveBytes() as live:
        overlay = job.tuning.overlay(backbone, [params], batch, None)
        real = live.during(lambda: decode(backbone, overlay, batch, how, range(len(prompts))))
    assert real < rehearsed < 3 * real
    assert tensors_at_once(job)[0].startswith("answers")


def test_a_plan_says_where_memory_is_not_known(fedhpc, run_config, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no fake tensors")

    monkeypatch.setattr(Backbone, "word_scores", refuse)
    status, out, _ = fedhpc("plan", run_config(), "--ranks", 2)
    assert status == 0
    assert "memory of the ranks: not known, its work cannot be rehearsed: no fake tensors" in out


def test_plan_knows_that_what_is_stored_wide_is_narrowed_in_memory(plan_job):
    job = plan_job(model__dtype="bfloat16", evaluate__batch_size=1)
    (label,) = [part for part in memory_parts(job, 2)["each device rank"] if "at once" in part]
    stored = sum(each.nbytes for each in stored_weights(job.config.model.name).values())
    # The output layer's class words are all that stays of it, in 16 bits.
    size = float(re.search(r"loading ([\d.]+) kB", label)[1]) * 1000
    assert stored <= size < 1.02 * stored


@pytest.mark.usefixtures("nothing_rehearsed")
@pytest.mark.parametrize(
    ("changes", "examples"),
    [
        ({}, 120),  # 6 devices of 20 examples
        ({"server__method": "mime", "device__optimizer": "sgd"}, 240),  # once more for the gradient
        ({"device__max_steps": 2}, 80),  # of 3 steps
        # 1, 2, 3 and 3 of 3 batches: a share of 1/4, 1/2, 3/4, 1, rounded up
        ({"curriculum": {"order": "fisher", "start": 0.25, "end": 0.75}, "federation__rounds": 4}, 90),
    ],
)
def test_plan_counts_passes_over_the_examples(fedhpc, run_config, changes, examples):
    assert f"about {examples} training examples a round" in fedhpc("plan", run_config(**changes), "--ranks", 5)[1]


@pytest.mark.usefixtures("nothing_rehearsed")
@pytest.mark.parametrize("ranks", [1, 2, 20])
def test_plan_takes_any_number_of_ranks(fedhpc, run_config, ranks):
    status, out, _ = fedhpc("plan", run_config(), "--ranks", ranks)
    assert status == 0
    assert ("idle" in out) == (ranks == 20)


def test_plan_refuses_what_run_would_refuse(fedhpc, run_config):
    status, _, err = fedhpc("plan", run_config(selection__ratio=0.1), "--ranks", 2)
    assert status == 2
    assert "selects no layer" in err


def test_inspect_tells_of_runs_checkpoints_and_files(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    folder = Path(yaml.safe_load(config.read_text())["run_dir"])
    status, out, _ = fedhpc("inspect", folder)
    assert status == 0
    for words in ("3 rounds recorded", "round_000003: valid", "round 3 completed, fedpeptao drift_corrected", "sha256"):
        assert words in out
    checkpoint = folder / "checkpoints/round_000003"
    assert "layer scores" in fedhpc("inspect", checkpoint)[1]
    (local, *_), (control, *_) = (sorted((folder / f"checkpoints/{kind}").iterdir()) for kind in ("local", "control"))
    assert "steps taken" in fedhpc("inspect", local)[1]
    assert "a device's control variate" in fedhpc("inspect", control)[1]
    (checkpoint / "server.h5").write_bytes(b"")
    status, out, _ = fedhpc("inspect", checkpoint)
    assert status == 2
    assert "NOT VALID" in out
    status, out, _ = fedhpc("inspect", folder)
    assert status == 0
    assert out.index("round_000003: NOT VALID") < out.index("round_000002: valid")


def test_inspect_names_every_score_of_the_last_evaluation(fedhpc, tmp_path):
    (tmp_path / "config.yaml").touch()
    scores = {
        "accuracy": 0.25,
        "accuracy_global": 0.5,
        "perplexity": 9,
        "perplexity_global": 8,
        "perplexity_held_out": 7,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 4, "bytes": 1, **scores}) + "\n")
    assert (
        "after round 5: perplexity 9.0000, global 8.0000, held-out devices 7.0000, token accuracy 0.2500, global 0.5"
        in (fedhpc("inspect", tmp_path)[1])
    )


def test_inspect_tells_of_a_run_stopped_within_a_round(fedhpc, run_config, monkeypatch):
    beat, said = LocalExchange.beat, []

    def stop_in_round_1(exchange, activity):
        said.append(activity)
        if sum("in round 1" in words for words in said) == 6:
            exchange.stop.ask("the test")
        beat(exchange, activity)

    monkeypatch.setattr(LocalExchange, "beat", stop_in_round_1)
    config = run_config(federation__partition="iid")
    assert fedhpc("run", config)[0] == EXIT_STOPPED
    checkpoints = Path(yaml.safe_load(config.read_text())["run_dir"]) / "checkpoints"
    (part,) = checkpoints.glob("round_000001_part_*")
    status, out, _ = fedhpc("inspect", part)
    assert status == 0
    assert "round 1 completed, and a part of the next one" in out
    # 12 devices share 240 examples: an epoch is 3 batches of 8, and the sixth step was not made.
    out = fedhpc("inspect", part / "progress_0001.h5")[1]
    assert "finished, 3 steps" in out
    assert "2 steps taken, unfinished" in out


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_inspect_refuses_what_is_no_run(fedhpc, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    status, _, err = fedhpc("inspect", path)
    assert status == 2
    assert "run directory" in err
