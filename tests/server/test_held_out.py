"""Devices that never train, and texts that belong to nobody, in a whole run."""

import numpy as np
import pytest
import tiny

from fedhpc.config.file import load_config
from fedhpc.federation.sampling import held_out_devices
from fedhpc.server import selecting
from fedhpc.server.job import load_job


def of_devices(record, sizes, devices):
    """Their accuracy together."""
    return sum(record["device_accuracy"][device] * sizes[device] for device in devices) / sizes[devices].sum()


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_held_out_devices_are_evaluated_apart_with_what_the_server_has(
    fedhpc, run_config, prepared_texts, kind, monkeypatch
):
    scored, global_scores = [], selecting.global_scores
    monkeypatch.setattr(selecting, "global_scores", lambda scores, n: scored.append(len(n)) or global_scores(scores, n))
    texts = {
        "data__path": str(prepared_texts),
        "tuning__head": "language_model",
        "federation__partition": "column",
        "federation__num_devices": 4,
    }
    config = run_config(
        **(texts if kind == "tokens" else {}), federation__held_out=0.25, federation__rounds=2, trace=False
    )
    status, _, err = fedhpc("run", config)
    assert status == 0, err
    job = load_job(load_config(config))
    num_devices, apart = job.config.federation.num_devices, held_out_devices(job.config)
    others = sorted({*range(num_devices)} - {*apart})
    assert len(apart) == num_devices // 4
    log = (tiny.run_dir(config) / "log.txt").read_text()
    assert f"federation.held_out: devices {', '.join(map(str, apart))} never train" in log
    assert scored == [len(others)]

    split = job.data.split("validation")
    sizes = np.array([split.num_terms[own].sum() for own in job.partition.validation])
    for record in tiny.metrics(config):
        assert not {*record["devices"]} & {*apart}
        assert record["accuracy_held_out"] == pytest.approx(of_devices(record, sizes, apart), abs=1e-5)
        assert record["accuracy"] == pytest.approx(of_devices(record, sizes, others), abs=1e-5)
        assert record["evaluated"] == len(job.partition.evaluated)
        assert ("perplexity_held_out" in record) == (kind == "tokens")
    if kind == "tokens":
        assert record["evaluated"] == 16  # of 24: two authors belong to nobody
        assert "belong to no device" in log


def test_without_held_out_devices_nothing_is_said_of_them(fedhpc, run_config):
    config = run_config(federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    assert not [key for record in tiny.metrics(config) for key in record if "held_out" in key]
