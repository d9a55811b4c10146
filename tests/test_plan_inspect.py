import re
from pathlib import Path

import pytest
import tiny
import yaml

from fedhpc.errors import EXIT_STOPPED
from fedhpc.exchange import LocalExchange


def test_plan_counts_bytes_parameters_and_places(fedhpc, run_config):
    config = run_config(selection__ratio=0.5)
    status, out, _ = fedhpc("plan", config, "--ranks", 5, "--examples-per-second", 10)
    assert status == 0
    per_layer = 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
    assert f"{4 * per_layer:,} parameters" in out
    assert f"{2 * per_layer:,} parameters, 2 of 4 layers" in out
    # 4 bytes a float, a 64-byte header, 4 device ranks down, with 4 bytes for each pack, and 6 sampled devices up.
    down, up = (copies * (4 * 2 * per_layer + header) / 1000 for copies, header in ((4, 64 + 4 * 6), (6, 64)))
    assert f"{down:.1f} kB" in out
    assert f"{up:.1f} kB" in out
    assert "rank 4: 3 devices" in out
    # 6 devices of 20 examples, one epoch, 10 examples/s on each of 4 ranks
    assert "3.0 s a round" in out
    assert not Path(yaml.safe_load(config.read_text())["run_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "down", "up"),
    [
        ({"exchange__dtype": "bfloat16"}, lambda n: 4 * (4 * n + 64 + 4 * 6), lambda n: 6 * (2 * n + 64)),
        ({"exchange__mode": "reduce"}, lambda n: 4 * (4 * n + 64 + 4 * 6), lambda n: 2 * 8 * n + 6 * 64),
        ({"server__method": "scaffold"}, lambda n: 4 * (2 * 4 * n + 64 + 4 * 6), lambda n: 6 * (4 * n + 64)),
    ],
)
def test_plan_counts_the_bytes_of_each_way_to_exchange(fedhpc, run_config, changes, down, up):
    """As tests/mpi/test_ranks.py counts them in runs; sums are two of float64, for fedpeptao."""
    out = fedhpc("plan", run_config(selection__ratio=0.5, trace=False, **changes), "--ranks", 5)[1]
    found = re.search(r"^  down, broadcast .*?([\d.]+ kB).*\n  up, .*?([\d.]+ kB)", out, re.MULTILINE).groups()
    n = 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
    assert found == tuple(f"{count(n) / 1000:.1f} kB" for count in (down, up))


def test_plan_counts_what_methods_and_devices_need(fedhpc, run_config):
    n = 4 * 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH  # bytes of two layers' prompts, exchanged or not

    def figures(**changes):
        out = fedhpc("plan", run_config(**{"selection__ratio": 0.5, **changes}), "--ranks", 5)[1]
        return {label.strip(): number for number, label in re.findall(r"^ +([\d.]+ [kM]?B)  (.+)$", out, re.MULTILINE)}

    assert figures(server__method="fedavg")["buffer of 6 uploads"] == f"{2 * 6 * n / 1000:.1f} kB"
    twice = figures(server__method="mime", device__optimizer="sgd")  # parameters and gradients
    assert twice["buffer of 6 uploads"] == f"{2 * 6 * 2 * n / 1000:.1f} kB"
    # Three devices of a rank keep their layers, the Fisher information of these, and two moments of all layers.
    assert "weights with the device's changes" not in twice
    whole = figures(tuning__kind="full", selection__strategy="all", model__dtype="bfloat16")
    assert whole["weights with the device's changes"] == whole["backbone, bfloat16"]
    more = figures(server__method="fedavg", sparse__fraction=0.5, device__reset_moments=False)
    assert more["what devices keep"] == f"{3 * (2 * n + 2 * 2 * n) / 1000:.1f} kB"
    half_done = "device ranks together: half-done updates, prompts and Adam moments"
    assert figures()[half_done] == f"{4 * 3 * 2 * n / 1000:.1f} kB"
    assert figures(device__pack="auto")[half_done] == f"{6 * 3 * 2 * n / 1000:.1f} kB"
    # 50 vectors of float64 of all four layers' prompts
    auto = figures(selection__ratio="auto")
    assert auto["Lanczos vectors, once, after the warm-up"] == f"{50 * 8 * 2 * n / 4 / 1000:.1f} kB"
    one, three = figures(), figures(device__pack=3)
    for part in ("prompts, gradients, Adam moments", "activations (upper bound)"):
        assert in_bytes(three[part]) == pytest.approx(3 * in_bytes(one[part]), rel=0.05)  # one decimal


def in_bytes(figure):
    number, unit = figure.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize(
    ("changes", "examples"),
    [
        ({}, 120),  # 6 devices of 20 examples
        ({"server__method": "mime", "device__optimizer": "sgd"}, 240),  # once more for the gradient
        # 1, 2, 3 and 3 of 3 batches: a share of 1/4, 1/2, 3/4, 1, rounded up
        ({"curriculum": {"order": "fisher", "start": 0.25, "end": 0.75}, "federation__rounds": 4}, 90),
    ],
)
def test_plan_counts_passes_over_the_examples(fedhpc, run_config, changes, examples):
    assert f"about {examples} training examples a round" in fedhpc("plan", run_config(**changes), "--ranks", 5)[1]


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
