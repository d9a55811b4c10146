"""Every file of experiments/ is a valid experiment of this checkout's jobs."""

from pathlib import Path

import pytest

from fedhpc.sweep.experiment import load_experiment

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.yaml"))
WAITING = {"adaptive", "baselines", "prompt-sources", "tunings-bytes", "tunings-rounds"}
"""Until the configuration has their keys."""


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in WAITING], ids=lambda path: path.stem)
def test_an_experiment_is_valid_without_notices(path):
    experiment = load_experiment(path)
    for cell in experiment.cells:
        assert cell.config.notices() == []
        assert cell.config_file.resolve().is_relative_to(ROOT / "jobs")
        assert cell.run_dir == Path("runs") / experiment.out.name / cell.name
        assert cell.config.data.path.endswith(f"/{cell.config.data.task}")


def test_no_two_experiments_share_their_folder():
    outs = [load_experiment(path).out for path in FILES if path.stem not in WAITING]
    assert len(set(outs)) == len(outs)


def test_layers_of_every_strategy_and_ratio():
    cells = load_experiment(ROOT / "experiments/layers.yaml").cells
    chosen = {(cell.config.selection.strategy, cell.config.selection.ratio) for cell in cells}
    partial = {
        (name, r) for name in ("score", "lowest_score", "random", "first", "last") for r in (0.17, 0.34, 0.5, 0.67)
    }
    assert chosen == partial | {("all", 1.0)}
    assert len(cells) == 2 * 3 * len(chosen)  # tasks and seeds


def test_ten_devices_train_in_each_round_whatever_their_number():
    cells = load_experiment(ROOT / "experiments/non-iid.yaml").cells
    federations = [cell.config.federation for cell in cells]
    assert {federation.num_devices for federation in federations} == {10, 100, 1000}
    assert {federation.devices_per_round for federation in federations} == {10}
