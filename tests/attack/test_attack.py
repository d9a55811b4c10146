"""Bad devices: which they are, and what they do, by hand and in whole runs."""

import math

import h5py
import numpy as np
import pytest
from tiny import metrics, run_dir, write_config, write_world

import fedhpc
from fedhpc.attack.attack import bad_devices, make_attack
from fedhpc.commands import cli
from fedhpc.config import Config, least_values
from fedhpc.federation.sampling import held_out_devices
from fedhpc.registry import ATTACKS

START, PARAMS = np.array([1, 2], np.float32), np.array([4, 6], np.float32)


def config_with(attack, **federation):
    return Config.model_validate({**least_values(), "attack": attack, "federation": federation})


def attack(**keys):
    return make_attack(config_with(keys))


def test_nobody_is_bad_unless_asked_for():
    assert bad_devices(Config.model_validate(least_values())) == []


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.3, 3), (0.35, 3), (1.0, 10)])
def test_a_share_of_the_devices_that_can_train_is_bad(share, count):
    config = config_with({"kind": "noise", "share": share}, num_devices=12, held_out=0.2)
    found = bad_devices(config)
    assert len(set(found)) == count
    assert found == sorted(found)
    assert not {*found} & {*held_out_devices(config)}


def test_every_class_becomes_another():
    labels = attack(kind="label_flip").labels(np.array([0, 1, 2, 5]), 6)
    assert labels.tolist() == [5, 4, 3, 0]


def test_the_opposite_of_what_was_learned():
    # P^t - 2 (P_i - P^t): 1 - 2 * 3, 2 - 2 * 4
    sent = attack(kind="sign_flip", scale=2.0).upload(PARAMS, START, np.random.default_rng(0))
    assert sent.tolist() == [-5, -6]


def test_noise_is_as_long_as_the_change():
    rng = np.random.default_rng(1)
    start, params = rng.normal(size=(2, 40_000)).astype(np.float32)
    sent = attack(kind="noise", scale=3.0).upload(params, start, rng)
    # the norm of n normal numbers is sqrt(n) within 1 / sqrt(2 n) of itself, four times that here
    honest = math.dist(params, start)
    assert math.dist(sent, start) == pytest.approx(3 * honest, rel=4 / math.sqrt(80_000))
    # and points nowhere: the cosine with the change is normal with deviation 1 / sqrt(n)
    assert abs((sent - start) @ (params - start)) < 5 / math.sqrt(40_000) * 3 * honest**2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("attack"), num_layers=2, num_train=60, num_validation=24)


def run(world, folder, name, **changes):
    """Two rounds of all of six devices; the configuration."""
    federation = {"num_devices": 6, "sample_rate": 1.0, "rounds": 2, "partition": "iid"}
    path = write_config(world, folder, name, federation=federation, **changes)
    assert cli.main(["run", str(path)]) == 0
    return path


def first_round(path):
    with h5py.File(run_dir(path) / "traces/round_000000.h5") as file:
        return {name: file[name][()] for name in ("device_ids", "broadcast", "uploads")}


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if kind != "none"])
def test_the_bad_devices_alone_send_something_else(world, tmp_path, kind):
    honest = first_round(run(world, tmp_path, "honest"))
    path = run(world, tmp_path, "attacked", attack={"kind": kind, "share": 0.34})
    attacked, bad = first_round(path), bad_devices(fedhpc.load_config(path))
    assert len(bad) == 2
    for device, one, other in zip(honest["device_ids"], honest["uploads"], attacked["uploads"], strict=True):
        assert np.array_equal(one, other) == (device not in bad)
        if kind == "sign_flip" and device in bad:
            assert other == pytest.approx(2 * honest["broadcast"] - one, abs=1e-6)


def test_a_robust_mean_holds_where_the_mean_does_not(world, tmp_path):
    """One of six sends the opposite, ten times as long: the mean turns round, the median does not."""
    attacked = {"kind": "sign_flip", "share": 0.17, "scale": 10.0}
    losses = {}
    for name, server, attack in (
        ("fedavg", {"method": "fedavg", "weights": "uniform"}, {}),
        ("mean", {"method": "fedavg", "weights": "uniform", "max_rejected": 0.5}, attacked),
        *((method, {"method": method, "max_rejected": 0.5}, attacked) for method in ("coordinate_median", "krum")),
    ):
        path = run(world, tmp_path, name, server=server, attack=attack, device={"learning_rate": 0.05})
        losses[name] = metrics(path)[-1]["loss"]
    assert losses["fedavg"] < losses["coordinate_median"] < losses["mean"]


def test_summed_uploads_are_attacked_too(world, tmp_path):
    attack = {"kind": "noise", "share": 0.34}
    one = run(world, tmp_path, "one", server={"method": "fedavg"}, attack=attack)
    summed = run(
        world, tmp_path, "summed", server={"method": "fedavg"}, attack=attack, exchange={"mode": "reduce"}, trace=False
    )
    a, b = (metrics(path)[-1] for path in (one, summed))
    assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"kind": "label_flop"}, "attack.kind"),
        ({"kind": "noise", "share": 0.0}, "attack.share"),
        ({"kind": "sign_flip", "scale": -1.0}, "attack.scale"),
    ],
)
def test_refused(world, tmp_path, capsys, attack, words):
    path = write_config(world, tmp_path, "refused", attack=attack)
    assert cli.main(["run", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_texts_have_no_classes_to_flip():
    with pytest.raises(Exception, match="label_flip needs classes"):
        Config.model_validate(
            {**least_values(), "attack": {"kind": "label_flip"}, "tuning": {"head": "language_model"}}
        )
