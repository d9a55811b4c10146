"""Every file of experiments/ is a valid experiment of this checkout's jobs."""

import re
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from fedhpc.config import TuningConfig
from fedhpc.notices import notices
from fedhpc.sweep.experiment import load_experiment
from fedhpc.tasks import TASKS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_valid_without_notices(path):
    experiment = load_experiment(path)
    for cell in experiment.cells:
        assert notices(cell.config) == []
        assert cell.config_file.resolve().is_relative_to(ROOT / "jobs")
        assert cell.run_dir == Path("runs") / experiment.out.name / cell.name
        assert re.sub(r"-\d{4}$", "", Path(cell.config.data.path).name) == cell.config.data.task


def test_no_two_experiments_share_their_folder():
    outs = [load_experiment(path).out for path in FILES]
    assert len(set(outs)) == len(outs)


def test_layers_of_every_strategy_and_ratio():
    cells = load_experiment(ROOT / "experiments/layers.yaml").cells
    chosen = {(cell.config.selection.strategy, cell.config.selection.ratio) for cell in cells}
    partial = {
        (name, ratio)
        for name in ("score", "lowest_score", "sensitivity", "random", "first", "last")
        for ratio in (0.17, 0.34, 0.5, 0.67)
    }
    assert chosen == partial | {("all", 1.0), ("score", "auto"), ("sensitivity", "auto")}
    assert len(cells) == 2 * 3 * len(chosen)  # tasks and seeds


def test_ten_devices_train_in_each_round_whatever_their_number():
    cells = load_experiment(ROOT / "experiments/non-iid.yaml").cells
    federations = [cell.config.federation for cell in cells]
    assert {federation.num_devices for federation in federations} == {10, 100, 1000}
    assert {federation.devices_per_round for federation in federations} == {10}


def test_every_part_of_the_adaptive_optimization_alone_and_with_every_other():
    cells = load_experiment(ROOT / "experiments/adaptive.yaml").cells
    parts = [(c.config.device.optimizer, c.config.server.momentum, c.config.server.control_variates) for c in cells]
    assert set(parts) == set(product(("sgd", "adamw"), (0.0, 0.5), (False, True)))
    assert len({cell.config.server.learning_rate for cell in cells}) == 1


def test_tunings_differ_by_nothing_but_the_tuning_and_its_learning_rate():
    cells = load_experiment(ROOT / "experiments/tunings-rounds.yaml").cells
    kinds = {cell.config.tuning.kind for cell in cells}
    assert kinds == set(get_args(TuningConfig.model_fields["kind"].annotation)) - {"attempt"}  # it needs other tasks'
    assert {(cell.config.server.method, cell.config.federation.rounds) for cell in cells} == {("fedavg", 30)}
    by_bytes = load_experiment(ROOT / "experiments/tunings-bytes.yaml")
    assert {cell.config.tuning.kind for cell in by_bytes.cells} == kinds - {"full"}
    same = {cell.name: cell.config.identity() for cell in cells}
    for cell in by_bytes.cells:
        assert cell.config.identity() == same[cell.name]


def test_the_baselines_are_compared_on_all_ten_tasks():
    cells = load_experiment(ROOT / "experiments/baselines.yaml").cells
    assert {cell.config.data.task for cell in cells} == set(TASKS)
    attempts = [cell for cell in cells if cell.values["method"] == "attempt"]
    assert len(cells) - len(attempts) == len(TASKS) * (len({cell.values["method"] for cell in cells}) - 1) * 3
    # Not on the tasks that its source prompts were tuned on.
    sources = {
        f"task={cell.config.data.task}" for cell in load_experiment(ROOT / "experiments/prompt-sources.yaml").cells
    }
    assert len(attempts) == (len(TASKS) - 3) * 3
    assert all(source in " ".join(attempts[0].config.tuning.sources) for source in sources)
    assert not sources & {f"task={cell.config.data.task}" for cell in attempts}
