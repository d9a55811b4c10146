"""Every file of experiments/ is a valid experiment of this checkout's jobs."""

import re
from itertools import product
from pathlib import Path

import pytest
from test_tasks import bert_like

from fedhpc.commands.cli import main
from fedhpc.commands.report import read_reference
from fedhpc.commands.sweep import prepared
from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.data.recipe import TargetModel
from fedhpc.data.task_files import load_task
from fedhpc.data.tasks import TASKS
from fedhpc.registry import TUNINGS
from fedhpc.server.notices import notices

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").glob("*.yaml"))


def stand_in(name):
    """For a model of the hub: knows every class word."""
    tokenizer = bert_like()
    tokenizer.add_tokens([word for task in TASKS.values() for word in task.classes.values()])
    kind = "decoder" if "SmolLM2" in name else "encoder"
    return TargetModel(tokenizer=tokenizer, kind=kind, can_score_words=True, vocabulary_size=len(tokenizer))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_valid_without_notices(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(path)
    for cell in experiment.cells:
        assert notices(cell.config) == []
        assert cell.config_file.resolve().is_relative_to(ROOT / "jobs")
        assert cell.run_dir == Path("runs") / experiment.out.name / cell.name
    prepared = {entry.path: load_task(entry.task or name).name for name, entry in experiment.prepare.items()}
    assert {(cell.config.data.path, cell.config.data.task) for cell in experiment.cells} == set(prepared.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_has_all_that_it_needs(path, tmp_path, monkeypatch, capsys):
    """One command, where every task has a folder: nothing is to be prepared, run or exported by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepared, "load_target_model", stand_in)
    (tmp_path / "data_prep").symlink_to(ROOT / "data_prep")
    for task in (*TASKS, "t0", "e2e"):
        (tmp_path / "sources" / task).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (tmp_path / "sources" / task / f"{split}.{'tsv' if task in TASKS else 'jsonl'}").touch()
    status = main(
        ["sweep", str(path), "--dry-run", "--sources", str(tmp_path / "sources"), "--out", str(tmp_path / "out")]
    )
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    needs = load_experiment(path).needs
    assert ("exports:" in out) == bool(needs)
    assert all(f"cells of {needed.path}:" in out for needed in needs)


def test_the_same_source_is_prepared_alike_everywhere():
    """A folder has one content, whichever experiment comes first."""
    found = {}
    for path in FILES:
        for name, entry in load_experiment(path).prepare.items():
            asked = (entry.task or name, entry.source, entry.max_length, entry.limit_train, entry.validation)
            assert found.setdefault(entry.path, asked) == asked


def test_published_figures_have_a_source():
    figures = read_reference(ROOT / "experiments/published.csv").figures
    assert all(re.search("Table", figure.source) for figure in figures)


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
    assert kinds == set(TUNINGS) - {"attempt"}  # it needs other tasks'
    assert {(cell.config.server.method, cell.config.federation.rounds) for cell in cells} == {("fedavg", 30)}
    by_bytes = load_experiment(ROOT / "experiments/tunings-bytes.yaml")
    assert {cell.config.tuning.kind for cell in by_bytes.cells} == kinds - {"full"}
    same = {cell.name: cell.config.identity() for cell in cells}
    for cell in by_bytes.cells:
        assert cell.config.identity() == same[cell.name]


def test_the_paper_s_methods_are_compared_on_all_ten_tasks():
    experiment = load_experiment(ROOT / "experiments/fedpeptao.yaml")
    assert {cell.config.data.task for cell in experiment.cells} == set(TASKS)
    attempts = [cell for cell in experiment.cells if cell.values["method"] == "attempt"]
    methods = {cell.values["method"] for cell in experiment.cells}
    assert len(experiment.cells) - len(attempts) == len(TASKS) * (len(methods) - 1) * 3
    # Not on the tasks that its source prompts were tuned on.
    (needed,) = experiment.needs
    assert set(attempts[0].config.tuning.sources) == {str(cell.export) for cell in needed.cells}
    assert len(attempts) == (len(TASKS) - 3) * 3
    assert not {cell.config.data.task for cell in needed.cells} & {cell.config.data.task for cell in attempts}


@pytest.mark.parametrize("name", ["fedpeptao", "fibecfed-published"])
def test_devices_are_evaluated_as_in_the_published_code(name):
    """On the test splits of the four tasks that are not of GLUE or SuperGLUE, with texts of 492 tokens."""
    entries = load_experiment(ROOT / f"experiments/{name}.yaml").prepare
    on_test = {task for task, entry in entries.items() if entry.validation == "test"}
    assert on_test == {"mpqa", "mr", "subj", "trec"}
    assert {entry.max_length for entry in entries.values()} == {492}
