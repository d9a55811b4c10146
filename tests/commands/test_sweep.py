"""An experiment's cells: what they are, that each is run once and to its end, and the tables."""

import csv
import datetime
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from tiny import final_prompts

from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.commands.sweep.results import results, write_tables
from fedhpc.commands.sweep.runner import Runner
from fedhpc.commands.sweep.standing import CellLog, standing
from fedhpc.commands.sweep.stops import Stops
from fedhpc.errors import EXIT_STOPPED
from fedhpc.job.job_files import COMMAND, TEMPLATES
from fedhpc.job.run_files import RunFiles

GRID = {
    "server.method": ["fedavg", "fedpeptao"],
    "layers": {"all": {"selection.strategy": "all"}, "half": {"selection": {"strategy": "first", "ratio": 0.5}}},
    "seed": [1, 2, 3],
}
STARTED = []
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def write(world, tmp_path_factory):
    """Write an experiment file over the tiny world; its path. Every cell goes to `out` beside it."""

    def write(grid=GRID, **others):
        folder = tmp_path_factory.mktemp("experiment")
        few_steps = {"trace": False, "device.batch_size": 20}  # about what a device has
        values = {"base": str(world), "out": str(folder / "out"), "set": few_steps, "grid": grid, **others}
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def start(path, *options):
    command = [sys.executable, "-m", "fedhpc", "sweep", path, *options]
    STARTED.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Where a test fails, too: its sweep would take a core from all that follow."""
    of_others = [*STARTED]
    yield
    for process in STARTED:
        if process not in of_others and process.poll() is None:
            process.terminate()
            process.wait(TIMEOUT_S)


def end(process):
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def wait_until(happened):
    until = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def states(path):
    experiment = load_experiment(path)
    return [standing(experiment, cell) for cell in experiment.cells]


def table(path, name="results"):
    """Everything but the seconds."""
    rows = csv.DictReader((path.parent / f"out/{name}.csv").open())
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(write):
    """A sweep of 12 cells that ran from start to end, two at once; not to be changed."""
    path = write()
    process = start(path, "--jobs", "2")
    yield path, process
    process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def finished(undisturbed):
    """The same, ended."""
    path, process = undisturbed
    status, out, err = end(process)
    assert status == 0, out + err
    return path


def test_interrupted_twice_it_ends_with_the_tables_of_an_uninterrupted_one(undisturbed, write):
    path = write()
    cells = load_experiment(path).cells
    for interruption, number in ((signal.SIGTERM, 2), (signal.SIGINT, 7)):
        process = start(path)
        wait_until(RunFiles(cells[number].run_dir).rounds_recorded)
        process.send_signal(interruption)
        status, out, _ = end(process)
        assert status == EXIT_STOPPED
        done = [state.done for state in states(path)]
        assert number <= sum(done) < 12
        assert done == sorted(done, reverse=True)
        stopped = states(path)[sum(done)]
    status, out, err = end(start(path, "--jobs", "2"))
    assert (status, err) == (0, "")
    assert f"12 cells, {sum(done)} of them done" in out
    assert (
        f"cell {sum(done)} {cells[sum(done)].name}: "
        + (f"goes on after round {stopped.completed}," if stopped.completed else "begins,")
        in out
    )
    reference, process = undisturbed
    assert end(process)[0] == 0
    assert table(path) == table(reference)
    assert table(path, "report") == table(reference, "report")
    assert (len(table(path)), len(table(path, "report"))) == (12, 4)
    for ours, theirs in zip(cells, load_experiment(reference).cells, strict=True):
        assert final_prompts(ours.run_dir / "config.yaml") == final_prompts(theirs.run_dir / "config.yaml")


def test_a_cell_is_a_run_of_its_own(finished, fedhpc):
    """The same bits as `fedhpc run` with the arguments that `--cell` prints."""
    cell = load_experiment(finished).cells[9]
    status, out, _ = fedhpc("sweep", finished, "--cell", 9)
    log, *arguments = out.splitlines()
    assert (status, arguments) == (0, cell.arguments)
    assert log == str(finished.parent / f"out/logs/{cell.name}.log")
    alone = finished.parent / "alone"
    assert fedhpc("run", *arguments, "--set", f"run_dir={alone}")[0] == 0
    assert final_prompts(alone / "config.yaml") == final_prompts(cell.run_dir / "config.yaml")


def test_what_is_done_is_not_run_again(finished, fedhpc):
    before = table(finished)
    status, out, err = fedhpc("sweep", finished)
    assert (status, err) == (0, "")
    folder = finished.parent / "out"
    assert out == f"12 cells, 12 of them done\ntables: {folder / 'results.csv'}, {folder / 'report.html'}\n"
    assert table(finished) == before


def test_the_list_says_where_each_cell_stands(finished, fedhpc):
    _, out, _ = fedhpc("sweep", finished, "--dry-run", "--set", "federation.rounds=5")
    assert len(lines := out.splitlines()) == 12
    assert lines[3].split() == ["3", "round", "3", "of", "5", str(load_experiment(finished).cells[3].run_dir)]
    _, out, _ = fedhpc("sweep", finished, "--dry-run")
    assert {line.split()[1] for line in out.splitlines()} == {"done"}
    _, out, _ = fedhpc("sweep", finished, "--dry-run", "--out", "elsewhere")
    assert out.splitlines()[11] == "11  not begun  elsewhere/method=fedpeptao,layers=half,seed=3"


def test_cells_begun_with_another_configuration_are_refused_before_anything_runs(finished, fedhpc):
    status, _, err = fedhpc("sweep", finished, "--set", "device.epochs=2")
    assert status == 2
    assert "12 cell(s) were begun with another configuration" in err
    assert "out/method=fedavg,layers=all,seed=1: device.epochs: 1 there, 2 now" in err


def test_cells_begun_with_other_data_are_refused_too(finished, fedhpc, world, tmp_path):
    assert fedhpc("sweep", finished, "--dry-run", "--set", f"data.path={world.parent / 'prepared'}")[0] == 0
    assert tiny.load_script("prepare").main(
        ["--task", str(world.parent / "source/task.yaml"), "--source", str(world.parent / "source"), "--model",
         str(world.parent / "backbone"), "--out", str(tmp_path / "other"), "--limit-train", "100"]
    ) == 0  # fmt: skip
    status, _, err = fedhpc("sweep", finished, "--dry-run", "--set", f"data.path={tmp_path / 'other'}")
    assert status == 2
    assert "prepared data: train examples: 240 there, 100 now" in err


def test_a_run_that_died_within_a_line_has_failed_all_the_same(write):
    experiment = load_experiment(write())
    log = CellLog(experiment.out, experiment.cells[0])
    log.begin("fedhpc run")
    with log.path.open("a") as file:
        file.write("Loading weights: 46%")
    log.end(137)
    assert log.last_status() == 137


def test_a_cell_without_its_last_checkpoint_is_not_done(finished):
    experiment = load_experiment(finished)
    folder = experiment.cells[0].run_dir / "checkpoints"

    def done():
        return standing(experiment, experiment.cells[0]).done

    (folder / "round_000003").rename(folder / "last")
    assert not done()
    (folder / "round_000002").rename(folder / "before")  # removed to save room
    assert done()
    (folder / "partial").mkdir()  # what a run leaves that is killed before its only checkpoint is whole
    assert not done()
    (folder / "partial").rmdir()
    (folder / "last").rename(folder / "round_000003")
    (folder / "before").rename(folder / "round_000002")


def test_a_stop_while_a_cell_is_being_started_reaches_it(write):
    """Python's handler runs although the main thread has blocked the signal: another thread has taken it."""
    experiment = load_experiment(write({"federation.rounds": [200]}))
    experiment.make_folder()
    stops = Stops()
    Runner(experiment, "env", None, lambda text: stops.pass_on(signal.SIGTERM, None), stops).run(experiment.cells, 1)
    assert stops.requested
    assert not standing(experiment, experiment.cells[0]).done


def test_failed_cells_are_reported_and_do_not_stop_the_others(write):
    grid = {
        "cell": {
            "misled": {"selection": {"strategy": "explicit", "layers": [9]}},
            "slain": {"federation.rounds": 10000},
            "sound": {},
        }
    }
    path = write(grid)
    slain = load_experiment(path).cells[1].run_dir
    process = start(path)
    wait_until(RunFiles(slain).rounds_recorded)
    os.kill(json.loads((slain / "lock").read_text())["pid"], signal.SIGKILL)
    status, out, _ = end(process)
    assert status == 1
    report = out[out.index("FAILED") :]
    assert "FAILED: cell=misled: failed with exit status 2, not begun\n    fedhpc: error: " in report
    assert "selection.layers" in report
    assert "FAILED: cell=slain: failed with exit status 137, round" in report
    assert "cell=sound" not in report
    assert [state.done for state in states(path)] == [False, False, True]
    assert [row["rounds"] for row in table(path)][::2] == ["0", "3"]


def test_a_second_sweep_is_refused_while_the_first_runs(write, fedhpc):
    path = write({"federation.rounds": [10000]})
    process = start(path)
    wait_until(RunFiles(load_experiment(path).cells[0].run_dir).rounds_recorded)
    status, _, err = fedhpc("sweep", path)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == EXIT_STOPPED
    assert status == 2
    assert f"error: out: {path.parent / 'out'} is in use by" in err


def test_a_stop_before_the_first_cell_is_one_too(write):
    path = write()
    process = start(path)
    assert process.stdout.readline() == "12 cells, 0 of them done\n"
    wait_until((path.parent / "out/lock").exists)
    process.send_signal(signal.SIGINT)
    status, out, _ = end(process)
    assert status == EXIT_STOPPED
    assert "stopped; the same command goes on from here" in out


def test_when_nobody_reads_its_words_any_more_it_runs_to_its_end(write):
    path = write({"seed": [1]}, set={"federation.rounds": 1, "trace": False})
    process = start(path)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(TIMEOUT_S) == 0
    assert [row["rounds"] for row in table(path)] == ["1"]


def test_a_name_that_is_too_long_for_a_file_system_is_cut_and_stays_unique(write):
    def names(*layers):
        path = write({"selection.layers": [list(range(count)) for count in layers]})
        return [cell.name for cell in load_experiment(path, ["selection.strategy=explicit"]).cells]

    whole = "layers=" + "+".join(map(str, range(86)))
    assert names(85) == [whole.removesuffix("+85")]
    assert len(f"{whole.removesuffix('+85')}.log") == 255
    cut = names(86, 87)
    assert {len(name) for name in cut} == {251}
    assert cut[0] == f"{whole[:238]}~{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
    assert cut[0][:239] == cut[1][:239]
    assert cut[0] != cut[1]
    (umlauts,) = (cell.name for cell in load_experiment(write({"data.task": ["ä" * 200]})).cells)
    assert umlauts[: len("task=") + 116] == "task=" + "ä" * 116


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--launch", ""], "launch: '': there is no such command"),
        (["--launch", "mpirunn -np 3"], "launch: 'mpirunn -np 3': there is no such command"),
        (["--out", "x" * 256], f"out: {'x' * 256}"),
        (["--out", "/proc/sweep"], "out: /proc cannot be written"),
        (["--submit", "nowhere.slurm", "--scheduler", "slurm"], "--submit nowhere.slurm: no such file here"),
    ],
)
def test_a_dry_run_refuses_what_the_sweep_would(write, fedhpc, option, message):
    status, _, err = fedhpc("sweep", write(), "--dry-run", *option)
    assert status == 2
    assert message in err


def test_a_report_that_could_not_be_written_is_refused_before_anything_runs(write, fedhpc):
    path = write()
    (path.parent / "out/report.csv").mkdir(parents=True)
    status, _, err = fedhpc("sweep", path, "--dry-run")
    assert status == 2
    assert f"{path.parent / 'out/report.csv'}: cannot be written: Is a directory" in err


def test_a_cells_arguments_are_for_a_program_to_read(write, fedhpc, monkeypatch):
    """In their own bytes, whatever people would read on this output."""
    path = write({"data.task": ["é好😀"]})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sys.stdout.buffer, encoding="ascii"))
    _, out, _ = fedhpc("sweep", path, "--cell", "0")
    assert out.splitlines() == [str(path.parent / "out/logs/task=é好-.log"), *load_experiment(path).cells[0].arguments]


def test_axes_settings_and_names(write):
    grid = {
        "data": [{"task": "moods"}, {"task": None}],
        "selection.layers": [[0, 2], [1]],
        "server.learning_rate": [0.5],
        "device.learning_rate": [1e-5],
    }
    path = write(grid, set={"selection": {"strategy": "explicit"}, "device": {"learning_rate": 7, "epochs": 2}})
    cells = load_experiment(path, ["seed=5", "device.epochs=4"]).cells
    assert [cell.name for cell in cells] == [
        f"data={task},layers={layers},server.learning_rate=0.5,device.learning_rate=1e-05"
        for task in ("moods", "null")
        for layers in ("0+2", "1")
    ]
    config = cells[0].config
    assert (config.data.task, config.selection.layers, config.seed) == ("moods", [0, 2], 5)
    assert config.device.epochs == 4
    assert (config.server.learning_rate, config.device.learning_rate) == (0.5, 1e-5)
    assert cells[0].run_dir == path.parent / "out" / cells[0].name
    assert load_experiment(path, out="other").cells[0].run_dir == Path("other") / cells[0].name


def test_a_date_is_text(write):
    (cell,) = load_experiment(write({"data.task": [datetime.date(2026, 1, 2)]})).cells
    assert (cell.name, cell.config.data.task) == ("task=2026-01-02", "2026-01-02")


def test_a_folder_that_cannot_be_made_is_refused(write, fedhpc):
    path = write()
    for option in ((), ("--report",)):
        status, _, err = fedhpc("sweep", path, "--out", path, *option)
        assert status == 2
        assert f"out: {path} cannot be written: Not a directory" in err


def test_an_axis_may_choose_the_base(write, world, tmp_path):
    (tmp_path / "big.yaml").write_text(f"base: {world}\nfederation: {{rounds: 77}}\n")
    cells = load_experiment(write({"base": [str(world), str(tmp_path / "big.yaml")]}, base=None)).cells
    assert [(cell.name, cell.config.federation.rounds) for cell in cells] == [("base=config", 3), ("base=big", 77)]


def test_excluded_combinations(write):
    def left(*exclude):
        return [cell.name for cell in load_experiment(write(exclude=list(exclude))).cells]

    every = left()
    assert len(every) == 12
    assert left({"server.method": "fedavg", "layers": "all"}) == every[3:]
    assert left({"server.method": "fedavg", "selection.strategy": "all"}) == every[3:]
    assert left({"seed": [1, 2]}) == every[2::3]
    numbered = {"devices": {6: {"federation.num_devices": 6}, 12: {"federation.num_devices": 12}}}
    cells = load_experiment(write(numbered, exclude=[{"devices": 12}])).cells
    assert [cell.name for cell in cells] == ["devices=6"]
    # One that the configuration refuses may be left out.
    path = write({"exchange.mode": ["gather", "reduce"]}, set={"trace": True}, exclude=[{"exchange.mode": "reduce"}])
    assert [cell.name for cell in load_experiment(path).cells] == ["mode=gather"]


def test_a_launcher_that_loses_its_ranks_has_failed(write, fedhpc):
    """Open MPI's mpirun ends with 0 when it loses a daemon on another node."""
    status, out, _ = fedhpc("sweep", write({"seed": [1]}), "--launch", "true")
    assert status == 1
    assert "FAILED: seed=1: failed with exit status 1, not begun" in out


PROBLEMS = {
    "every cell's problems, each once": (
        {"grid": {"seed": [1, -1], "server.methd": ["fedavg"], "device.epochs": [1, "two"]}},
        [
            "3 problem(s)",
            "server.methd: unknown key; did you mean server.method? (cell seed=1,methd=fedavg,epochs=1; "
            "seed=1,methd=fedavg,epochs=two; seed=-1,methd=fedavg,epochs=1; seed=-1,methd=fedavg,epochs=two)",
            "seed: should be greater than or equal to 0, found -1 (cell seed=-1,methd=fedavg,epochs=1; seed=-1",
            "device.epochs: should be a valid integer, found 'two' (cell seed=1,methd=fedavg,epochs=two; seed=-1",
        ],
    ),
    "a combination that is refused": (
        {"grid": {"exchange.mode": ["gather", "reduce"]}, "set": {"trace": True}},
        ["1 problem(s)", "trace: true writes each upload; it needs exchange.mode: gather (cell mode=reduce)"],
    ),
    "two values of one name": (
        {"grid": {"data": [{"task": "a", "path": "b"}, {"task": "a", "path": "c"}]}},
        ["grid.data: 2 values have the name 'a'; name each"],
    ),
    "two axes for one key": (
        {"grid": {"a": {"x": {"seed": 1}}, "b": {"y": {"seed": 2}}}},
        ["grid: a and b both set seed"],
    ),
    "a run directory": ({"grid": {"seed": [1]}, "set": {"run_dir": "x"}}, ["run_dir: follows from out:"]),
    "an unknown key to exclude": (
        {"exclude": [{"server.methd": "fedavg"}]},
        ["exclude: server.methd: neither an axis nor a key; did you mean server.method?"],
    ),
    "an unknown name to exclude": (
        {"exclude": [{"layers": "hafl"}]},
        ["exclude: layers: no value has the name 'hafl'; there are all, half"],
    ),
    "an axis of the name of a figure": (
        {"grid": {"rounds": {"few": {"federation.rounds": 1}}}},
        ["grid.rounds: is a column of results.csv already; choose another name"],
    ),
    "nothing left": ({"exclude": [{"seed": [1, 2, 3]}]}, ["exclude: leaves no cell of the grid"]),
    "an unknown key of the file": (
        {"grids": {}},
        ["grids: unknown key; valid here: base, out, prepare, needs, set, grid, exclude, "],
    ),
    "no axis": ({"grid": {}}, ["grid: "]),
    "no list": (
        {"grid": {"seed": 1}},
        ["1 problem(s)", "grid.seed: should be a list of values, or names", "; found 1"],
    ),
    "no name": ({"out": ["x"]}, ["out: should be a valid string, found ['x']"]),
    "an axis that is no part of a name": ({"grid": {"a/b": {"x": {"seed": 1}}}}, ["grid.'a/b': becomes a part"]),
    "no base": ({"base": None}, ["base: is required"]),
    "a base that is not there": ({"base": "nowhere.yaml"}, ["nowhere.yaml: cannot be read"]),
    "a launcher that is not there": (
        {"launch": "mpirunn -np 3"},
        ["launch: 'mpirunn -np 3': there is no such command"],
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_faulty_experiment_is_refused_before_anything_runs(write, fedhpc, problem):
    changes, messages = PROBLEMS[problem]
    path = write(**changes)
    status, _, err = fedhpc("sweep", path)
    assert status == 2
    for message in messages:
        assert message in err
    assert not (path.parent / "out").exists()


def test_a_configuration_is_no_experiment(world, fedhpc):
    status, _, err = fedhpc("sweep", world)
    assert status == 2
    assert err.startswith(f"fedhpc: error: {world}: is no experiment: it has neither grid: nor out:")
    assert err.count("\n") == 1


def test_what_an_option_may_not_vary(write, fedhpc):
    for override, key in (("seed=1", "seed"), ("selection={ratio: 0.5}", "selection"), ("run_dir=x", "run_dir")):
        status, _, err = fedhpc("sweep", write(), "--set", override)
        assert status == 2
        assert f"{key}: " in err


def test_a_sweep_is_not_started_by_mpirun(write, fedhpc, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    status, _, err = fedhpc("sweep", write())
    assert status == 2
    assert "--launch 'mpirun -np 3'" in err


def test_outside_a_checkout_the_job_file_is_the_packages(write, fedhpc, tmp_path, monkeypatch):
    path = write()
    monkeypatch.chdir(tmp_path)
    _, out, _ = fedhpc("sweep", path, "--submit", "--dry-run", "--scheduler", "slurm")
    export = f"--export=ALL,FEDHPC={COMMAND},FEDHPC_TEMPLATES={TEMPLATES}"
    assert shlex.split(out)[:4] == ["sbatch", export, "--array=0-11", str(TEMPLATES / "sweep.slurm")]
    assert (TEMPLATES / "sweep.slurm").is_file()


def test_an_array_of_other_cells_than_were_submitted_is_refused(write, fedhpc):
    path = write()
    options = ["--submit", "--scheduler", "slurm", "--dry-run", "--jobs", 4, "--set", "trace=true"]
    _, out, _ = fedhpc("sweep", path, *options)
    digest = load_experiment(path).digest
    assert out == f"sbatch --array=0-11%4 jobs/sweep.slurm {path} --expect {digest} --set trace=true\n"
    assert fedhpc("sweep", path, "--cell", 3, "--expect", digest)[0] == 0
    text = path.read_text()
    for change in (text.replace("  - 2\n", ""), text.replace("trace: false", "device.epochs: 7")):
        assert change != text
        path.write_text(change)
        status, _, err = fedhpc("sweep", path, "--cell", 3, "--expect", digest)
        assert status == 2
        assert "the experiment has other cells or settings now" in err
    path.write_text(text.replace("  - 2\n", ""))
    assert fedhpc("sweep", path, "--cell", 8)[2].endswith("--cell 8: the cells have the numbers 0 to 7\n")


def record(round_index, accuracy, **scores):
    return {
        "round": round_index,
        "accuracy": accuracy,
        "accuracy_global": accuracy and accuracy - 0.125,
        "bytes": 100,
        "seconds": {"round": 0.5},
        **scores,
    }


def test_a_budget_of_bytes_cuts_the_curve(write):
    cell = load_experiment(write(set={"federation.rounds": 5})).cells[0]
    cell.run_dir.mkdir(parents=True)
    for index, accuracy in enumerate([None, 0.625, None, 0.5, 0.875, 1.0]):  # run with more rounds before
        RunFiles(cell.run_dir).append_metrics(record(index, accuracy))
    figures = ("rounds", "accuracy", "accuracy_global", "best_accuracy_global", "bytes", "seconds", "best_accuracy")

    def found(budget):
        return tuple(results(cell, budget)[name] for name in figures)

    assert found(None) == (5, 0.875, 0.75, 0.75, 500, 2.5, 0.875)
    assert found(400) == (4, 0.5, 0.375, 0.5, 400, 2.0, 0.625)
    assert found(399) == (3, 0.625, 0.5, 0.5, 300, 1.5, 0.625)
    assert found(100) == (1, None, None, None, 100, 0.5, None)
    assert found(99) == (0, None, None, None, 0, 0, None)


def test_every_score_has_columns_its_last_value_and_the_best(write):
    experiment = load_experiment(write(set={"federation.rounds": 3}))
    for cell, texts in zip(experiment.cells, ([9.0, 5.0, 7.0], [None]), strict=False):
        cell.run_dir.mkdir(parents=True)
        (cell.run_dir / "config.yaml").write_text(cell.config.to_yaml())
        for index, perplexity in enumerate(texts):
            scores = {"perplexity": perplexity, "perplexity_global": perplexity, "accuracy_held_out": 0.5}
            RunFiles(cell.run_dir).append_metrics(record(index, 0.25, **(scores if perplexity else {})))
    table, _ = write_tables(experiment)
    one, other, *_ = csv.DictReader(table.open())
    columns = list(one)
    assert columns[columns.index("deviation_last_five") + 1 :] == [
        *("perplexity", "best_perplexity", "perplexity_global", "best_perplexity_global"),
        *("perplexity_held_out", "best_perplexity_held_out", "accuracy_held_out", "best_accuracy_held_out"),
    ]
    assert (one["perplexity"], one["best_perplexity"], one["best_accuracy_held_out"]) == ("7.0", "5.0", "0.5")
    assert (other["accuracy"], other["perplexity"], one["perplexity_held_out"]) == ("0.25", "", "")
