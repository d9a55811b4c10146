"""One process, the whole job."""

import json
import shutil

import h5py
import numpy as np
import pytest
import tiny
from tiny import final_prompts, metrics, run_dir

from fedhpc.checkpoint import Checkpoints


def test_a_run_leaves_the_promised_files_and_learns(fedhpc, run_config):
    config = run_config(federation__rounds=10, selection__strategy="all", device__learning_rate=0.1)
    status, out, _ = fedhpc("run", config)
    assert status == 0
    assert out.count("round ") == 10
    folder = run_dir(config)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "traces",
    }
    assert (folder / "checkpoints/LATEST").read_text() == "round_000010\n"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"LATEST", "round_000009", "round_000010"}
    assert "rank 0/1" in (folder / "log.txt").read_text()
    records = metrics(config)
    assert [record["round"] for record in records] == list(range(10))
    for record in records:
        assert len(record["devices"]) == 6
        assert record["bytes_down"] == record["bytes_up"] == 0  # nothing crosses between ranks of one process
        assert {"broadcast", "local", "gather", "server", "evaluate", "checkpoint", "idle"} <= set(record["seconds"])
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    majority = 18 / 48  # `mixed` in the validation split
    assert records[-1]["accuracy"] > majority + 0.3


def test_half_of_the_layers_are_exchanged_and_the_others_stay_on_the_device(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    folder = Checkpoints(run_dir(config)).path(3)
    with h5py.File(folder / "server.h5") as file:
        layers = file["prompts"].attrs["layers"].tolist()
        scores = file["selection/scores"][()]
        assert file["prompts"].shape == (2, 2, tiny.NUM_TOKENS, tiny.KEY_WIDTH)
        assert file["control/devices"].shape[1:] == file["prompts"].shape
    assert layers == sorted(np.argsort(-scores, kind="stable")[:2].tolist())
    with h5py.File(folder / "devices_0001.h5") as file:
        seen = sorted(map(int, file["devices"]))
        local = [file[f"devices/{device}/local_prompts"][()] for device in seen]
    assert seen == sorted({device for record in metrics(config) for device in record["devices"]})
    assert local[0].shape == (2, 2, tiny.NUM_TOKENS, tiny.KEY_WIDTH)
    assert not np.array_equal(local[0], local[1])


@pytest.mark.parametrize("method", ["fedavg", "fedpeptao"])
def test_a_resumed_run_ends_with_the_same_bits(fedhpc, run_config, method):
    changes = {"server__method": method, "device__reset_moments": False, "tuning__dropout": 0.1}
    whole, parts = run_config("whole", **changes), run_config("parts", **changes)
    assert fedhpc("run", whole)[0] == 0
    assert fedhpc("run", parts, "--set", "federation.rounds=1")[0] == 0
    status, _, err = fedhpc("run", parts, "--resume", "require")
    assert status == 0
    assert "resuming after round 1 of 3" in err
    assert final_prompts(whole) == final_prompts(parts)
    local = []
    for config in (whole, parts):
        with h5py.File(Checkpoints(run_dir(config)).path(3) / "devices_0001.h5") as file:
            local.append({name: entry["local_prompts"][()].tobytes() for name, entry in file["devices"].items()})
    assert local[0] == local[1]
    assert [r["accuracy"] for r in metrics(whole)] == [r["accuracy"] for r in metrics(parts)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(fedhpc, run_config):
    configs = [run_config("a"), run_config("b"), run_config("c", seed=7)]
    assert [fedhpc("run", config)[0] for config in configs] == [0, 0, 0]
    a, b, c = map(final_prompts, configs)
    assert a == b != c


@pytest.mark.parametrize("by", ["eigengap", "density"])
def test_an_automatic_ratio_narrows_the_exchange_after_the_warm_up(fedhpc, run_config, by):
    changes = {
        "selection__ratio": "auto",
        "selection__auto_by": by,
        "selection__warmup_rounds": 2,
        "federation__rounds": 4,
    }
    whole, parts = run_config("whole", **changes), run_config("parts", **changes)
    status, _, err = fedhpc("run", whole)
    assert status == 0
    assert "lossless ratio" in err
    shapes = []
    for t in range(4):
        with h5py.File(run_dir(whole) / f"traces/round_{t:06d}.h5") as file:
            shapes.append(len(file["broadcast"]))
    assert shapes[:2] == [tiny.NUM_LAYERS] * 2
    assert shapes[2] == shapes[3] <= tiny.NUM_LAYERS
    for rounds in (1, 2, 3, 4):
        assert fedhpc("run", parts, "--set", f"federation.rounds={rounds}")[0] == 0
    assert final_prompts(whole) == final_prompts(parts)


def test_moments_kept_on_a_device_outlive_the_warm_up(fedhpc, run_config):
    config = run_config(
        selection__ratio="auto",
        selection__warmup_rounds=1,
        device__reset_moments=False,
        federation__rounds=1,
    )
    assert fedhpc("run", config)[0] == 0
    with h5py.File(Checkpoints(run_dir(config)).path(1) / "devices_0001.h5") as file:
        assert sorted(map(int, file["devices"])) == sorted(metrics(config)[0]["devices"])
        assert all("prompts.exp_avg" in entry["optimizer"] for entry in file["devices"].values())


def test_a_warm_up_that_outlasts_the_run_is_noticed(fedhpc, run_config):
    _, _, err = fedhpc("run", run_config(selection__ratio="auto", selection__warmup_rounds=10))
    assert "all layers are exchanged to the end" in err


def test_rerunning_a_finished_run_changes_nothing(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    before = (run_dir(config) / "metrics.jsonl").read_text()
    assert fedhpc("run", config)[0] == 0
    assert (run_dir(config) / "metrics.jsonl").read_text() == before


def test_a_broken_newest_checkpoint_is_reported_and_the_one_before_is_used(fedhpc, run_config):
    config, whole = run_config(), run_config("whole")
    assert fedhpc("run", config)[0] == fedhpc("run", whole)[0] == 0
    path = Checkpoints(run_dir(config)).path(3) / "server.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, _, err = fedhpc("run", config)
    assert status == 0
    assert f"{path}: is truncated or altered" in err
    assert "resuming after round 2 of 3" in err
    assert final_prompts(config) == final_prompts(whole)


def test_a_run_that_learns_is_not_warned_about(fedhpc, run_config):
    assert "grows without bound" not in fedhpc("run", run_config(federation__rounds=10))[2]


def test_a_run_that_grows_without_bound_is_warned_about(fedhpc, run_config):
    config = run_config(
        server__variant="released", device__learning_rate=0.0005, federation__rounds=10, selection__strategy="all"
    )
    _, _, err = fedhpc("run", config, "--set", "server.learning_rate=1.0", "--set", "evaluate.every=20")
    assert "known to diverge" in err
    assert err.count("the update norm grows without bound") == 1


class TestBadInput:
    """One clear message, exit 2, no traceback, nothing trained, nothing lost."""

    @pytest.fixture
    def refused(self, fedhpc, run_config):
        def check(*words, arguments=(), config=None, **changes):
            config = config or run_config("refused", **changes)
            status, out, err = fedhpc("run", config, *arguments)
            assert status == 2
            assert "Traceback" not in err
            assert "round 1" not in out
            message = err[err.index("fedhpc: error: ") :]
            for word in words:
                assert str(word) in message
            return message

        return check

    def test_misspelt_key_names_the_nearest(self, refused):
        refused("device.lerning_rate", "did you mean device.learning_rate?", device__lerning_rate=0.1)

    def test_all_problems_at_once(self, refused):
        refused(
            "3 problem(s)",
            "device.epochs",
            "'two'",
            "federation.sample_rate",
            "server.methd",
            device__epochs="two",
            federation__sample_rate=0.0,
            server__methd="fedavg",
        )

    def test_missing_model(self, refused, tmp_path):
        refused("model.name", tmp_path / "nowhere", "no folder", model__name=str(tmp_path / "nowhere"))

    def test_missing_data(self, refused, tmp_path):
        refused(tmp_path / "nowhere", data__path=str(tmp_path / "nowhere"))

    def test_another_tokenizer(self, refused, world, tmp_path):
        other = tiny.write_backbone(tmp_path / "other")
        vocabulary = other / "tokenizer.json"
        vocabulary.write_text(vocabulary.read_text().replace("lovely", "lovelier"))
        refused("tokenizer", other, "prepare.py", model__name=str(other))

    def test_more_devices_than_examples(self, refused):
        refused("num_devices", "1000", "240", federation__num_devices=1000)

    def test_shards_that_leave_a_device_empty(self, refused):
        refused("shards", "num_devices", federation__partition="shards", federation__num_devices=200)

    def test_a_ratio_that_selects_no_layer(self, refused):
        refused("selection.ratio: 0.1 of 4 layers selects no layer", "0.25", selection__ratio=0.1)

    def test_another_task_or_head(self, refused):
        refused("data.task: rte", "moods", data__task="rte")
        refused("tuning.head: linear", "verbalizer", tuning__head="linear")

    def test_too_many_positions(self, refused):
        refused("tuning.num_tokens", "64 positions", tuning__num_tokens=60)

    def test_run_dir_not_writable(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        refused("run_dir", "not writable", run_dir=str(tmp_path / "file" / "run"))

    def test_only_one_class(self, refused, world, tmp_path):
        source = tiny.write_source(tmp_path / "one")
        lines = (source / "train.tsv").read_text().splitlines()
        (source / "train.tsv").write_text("\n".join([lines[0], *(x for x in lines if x.endswith("\tbad"))]) + "\n")
        arguments = ["--task", source / "task.yaml", "--source", source, "--model", world.parent / "backbone"]
        prepare = tiny.load_script("prepare")
        assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "prepared")]) == 0
        refused("prepared", "same label", data__path=str(tmp_path / "prepared"))

    @pytest.mark.parametrize("damage", ["cut", "altered"])
    def test_damaged_data(self, refused, world, tmp_path, damage):
        prepared = shutil.copytree(world.parent / "prepared", tmp_path / "prepared")
        path = prepared / "train.tokens.npy"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content[:-4] if damage == "cut" else content)
        refused("train.tokens.npy", damage, data__path=str(prepared))

    def test_resume_with_another_configuration(self, refused, fedhpc, run_config):
        config = run_config()
        assert fedhpc("run", config)[0] == 0
        message = refused("device.epochs: 1 in the checkpoint, 2 now", config=run_config(device__epochs=2, seed=1))
        assert "seed: 42 in the checkpoint, 1 now" in message

    def test_resume_with_other_shapes(self, refused, fedhpc, run_config):
        assert fedhpc("run", run_config())[0] == 0
        refused("tuning.num_tokens: 3 in the checkpoint, 4 now", config=run_config(tuning__num_tokens=4))

    def test_resume_with_data_of_other_class_words(self, refused, fedhpc, run_config, world, tmp_path):
        assert fedhpc("run", run_config())[0] == 0
        source = shutil.copytree(world.parent / "source", tmp_path / "source")
        task = (source / "task.yaml").read_text()
        (source / "task.yaml").write_text(
            task.replace("great", "WORD").replace("terrible", "great").replace("WORD", "terrible")
        )
        arguments = ["--task", source / "task.yaml", "--source", source, "--model", world.parent / "backbone"]
        prepare = tiny.load_script("prepare")
        assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "prepared")]) == 0
        refused("data:", config=run_config(data__path=str(tmp_path / "prepared")))

    @pytest.mark.parametrize("change", [{"word_ids": [[10], [9], [11]]}, {"splits": {}}, {"pad_id": -5}])
    def test_a_description_changed_by_hand(self, refused, world, tmp_path, change):
        prepared = shutil.copytree(world.parent / "prepared", tmp_path / "prepared")
        path = prepared / "description.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        refused(path, "altered", data__path=str(prepared))

    @pytest.mark.parametrize("name", ["checkpoints", "log.txt"])
    def test_something_else_in_the_place_of_a_run_file(self, refused, run_config, name):
        config = run_config()
        run_dir(config).mkdir()
        path = run_dir(config) / name
        path.mkdir() if name == "log.txt" else path.write_text("")
        refused(path, "in the way", config=config)

    def test_resume_required_or_forbidden(self, refused, fedhpc, run_config):
        config = run_config()
        refused("--resume require", "no checkpoint", config=config, arguments=["--resume", "require"])
        assert fedhpc("run", config)[0] == 0
        refused("--resume never", config=config, arguments=["--resume", "never"])

    @pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
    def test_no_whole_checkpoint(self, refused, fedhpc, run_config, damage):
        config = run_config()
        assert fedhpc("run", config)[0] == 0
        checkpoints = Checkpoints(run_dir(config))
        for round_index in checkpoints.rounds():
            path = checkpoints.path(round_index) / "server.h5"
            content = path.read_bytes()
            path.unlink()
            if damage != "missing":
                path.write_bytes({"truncated": content[:-100], "empty": b"", "foreign": b"something else"}[damage])
        refused("no checkpoint is whole", "server.h5", config=config)

    def test_more_than_the_file_can_say(self, refused, tmp_path):
        for content in ("- a list", "run_dir: [", "base: nowhere.yaml"):
            path = tmp_path / "odd.yaml"
            path.write_text(content)
            refused(tmp_path, config=path)
        refused("nowhere.yaml", config=tmp_path / "nowhere.yaml")
