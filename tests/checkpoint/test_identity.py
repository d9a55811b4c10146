"""A run goes on with the same data and backbone, wherever they are, and says in what others differ."""

import json

import pytest
import tiny
from safetensors.torch import load_file, save_file

from fedhpc.checkpoint.identity import OLD_DATA, OLD_MODEL, differences
from fedhpc.config.file import load_config
from fedhpc.model.weight_files import model_sha256
from fedhpc.server.job import Job


def prepare(world, model, out, *options):
    source = world.parent / "source"
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", model, "--out", out, *options]
    assert tiny.load_script("prepare").main([str(argument) for argument in arguments]) == 0
    return out


def rewrite_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def go_on(run_config, fedhpc):
    """After a round, run one more with overrides: (exit status, standard error)."""
    config = run_config(federation__rounds=1)
    assert fedhpc("run", config)[0] == 0

    def command(*overrides):
        options = [part for text in ("federation.rounds=2", *overrides) for part in ("--set", text)]
        status, _, err = fedhpc("run", config, *options)
        return status, err

    return command


def test_files_that_say_the_same_are_the_same(world, go_on, tmp_path):
    model = tiny.write_backbone(tmp_path / "copy")
    # As another version of transformers writes it, and in shards.
    rewrite_config(model, transformers_version="4.57.0", torch_dtype="float32", attention_dropout=0.0)
    values = json.loads((model / "config.json").read_text())
    assert values.pop("mlp_bias") is False
    assert values.pop("head_dim") == values["hidden_size"] // values["num_attention_heads"]
    values["rope_theta"] = int(values.pop("rope_parameters")["rope_theta"])
    (model / "config.json").write_text(json.dumps(values))
    tensors = load_file(model / "model.safetensors")
    shards = {name: f"{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for shard in sorted(set(shards.values())):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, model / shard)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    data = prepare(world, model, tmp_path / "prepared")
    status, err = go_on(f"model.name={model}", f"data.path={data}")
    assert status == 0, err


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("examples", "prepared data: train examples: 240 in the checkpoint, 100 now"),
        ("config", "backbone: rms_norm_eps: 1e-06 in the checkpoint, 1e-05 now"),
        ("weights", "backbone: weights: content"),
    ],
)
def test_what_differs_is_named(world, go_on, tmp_path, other, line):
    model = tiny.write_backbone(tmp_path / "backbone", seed=int(other == "weights"))
    if other == "config":
        rewrite_config(model, rms_norm_eps=1e-5)
    data = prepare(world, model, tmp_path / "prepared", *(["--limit-train", 100] if other == "examples" else []))
    status, err = go_on(f"model.name={model}", f"data.path={data}")
    assert status == 2
    assert line in err
    assert ("backbone:" in err) == line.startswith("backbone:")


def test_a_checkpoint_that_knows_data_and_backbone_by_a_checksum_each_is_resumed(fedhpc, run_config, monkeypatch):
    def identity(job):
        settings = {**job.config.identity(), "sha256": job.config.sha256, "data.task": None, "data.max_length": None}
        del settings["model.name"]
        return settings | {
            OLD_DATA: job.data.description.sha256,
            OLD_MODEL: model_sha256(job.config.model.name),
        }

    config = run_config(federation__rounds=1)
    with monkeypatch.context() as before:
        before.setattr(Job, "identity", property(identity))
        assert fedhpc("run", config)[0] == 0
    status, _, err = fedhpc("run", config, "--set", "federation.rounds=2")
    assert status == 0, err


def test_a_key_that_is_newer_than_the_checkpoint_has_its_default():
    new = {"federation.alpha": 1.0, "device.later": 3}
    assert differences({"federation.alpha": 1.0}, new, "there", {"device.later": 3}) == []
    assert differences({"federation.alpha": 1.0}, new, "there", {"device.later": 4}) == ["device.later: 4 there, 3 now"]


def test_the_resolved_configuration_says_what_the_data_are(fedhpc, run_config):
    config = run_config(federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    data = load_config(tiny.run_dir(config) / "config.yaml").data
    assert (data.task, data.max_length) == ("moods", 128)
