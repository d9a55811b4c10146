"""The benchmarks' stand-ins are still what the engine expects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedhpc.device import training
from fedhpc.device.processor import limit_threads
from fedhpc.device.worker import Worker
from fedhpc.exchange import LocalExchange
from fedhpc.job.stopping import StopRequest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_rounds_without_work_go_through(tmp_path, monkeypatch):
    import round as benchmark
    from stand_in import make_job, run_job

    monkeypatch.setattr(training, "local_updates", benchmark.StandIn())
    job, exchange = make_job(tmp_path / "run", rounds=2, num_devices=2, sampled=1), LocalExchange(StopRequest())
    exchange.handler = Worker(job.config, job.data, job.partition, None, job.tuning, exchange).handle
    server = run_job(job, exchange)
    assert [record["steps"] for record in server.records] == [16, 16]


def test_the_visit_to_a_gpu_goes_through_on_a_cpu(tmp_path, monkeypatch):
    import gpu_visit as benchmark

    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["gpu_visit.py", "--small", "--json", str(file)])
    limit_threads(1)  # the shapes are too small to share
    benchmark.main()
    found = json.loads(file.read_text())
    assert found["skipped"] == []
    for name in ("RoBERTa large, deep prompts", "RoBERTa large, LoRA", "LLaMA 7B, deep prompts", "LLaMA 7B, LoRA"):
        assert found[name]["texts in rows"]
        assert found[name]["same bits twice"]
        assert found[name]["same bits after a stop"]
        for pack in map(str, benchmark.TRIED):
            assert all(found[name][pack][how]["examples/s"] > 0 for how in ("in rows", "padded"))


def test_a_visit_that_is_too_short_says_what_it_left_out(tmp_path, monkeypatch):
    import gpu_visit as benchmark

    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["gpu_visit.py", "--small", "--json", str(file), "--minutes", "0"])
    benchmark.main()
    assert json.loads(file.read_text())["skipped"] == ["RoBERTa large", "LLaMA 7B"]


def test_ranks_that_leave_pytorch_out_have_all_of_a_rank():
    rank = "import sys, ranks; sys.meta_path.insert(0, ranks.LeaveOut()); import fedhpc.commands.role"
    done = subprocess.run([sys.executable, "-c", rank], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_a_server_that_has_seen_many_devices_is_measured(tmp_path):
    import checkpoint as benchmark

    found = benchmark.measure_server(tmp_path, 12)
    assert found["seen"] == 12
    assert found["checkpoint_s"] > 0
