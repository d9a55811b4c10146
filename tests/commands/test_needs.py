"""One command from nothing to tables: data that an experiment has prepared, and cells of others that it needs."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import yaml

from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.commands.sweep.local import find_work
from fedhpc.commands.sweep.prepared import make
from fedhpc.commands.sweep.stops import Stops
from fedhpc.errors import EXIT_STOPPED, ConfigError
from fedhpc.files import replacing

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A backbone and a source that are not to be changed."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "all").mkdir()
    tiny.write_backbone(folder / "backbone")
    tiny.write_source(folder / "all/moods", num_train=60, num_validation=24)
    return folder


@pytest.fixture(scope="module")
def write(given, tmp_path_factory):
    """Write an experiment that needs another one, where nothing is prepared; the file's path."""

    def write(needed=None, **changes):
        folder = tmp_path_factory.mktemp("experiment")
        source = given / "all/moods"
        base = {
            "run_dir": "unused",
            "model": {"name": str(given / "backbone")},
            "data": {"path": "unused"},
            "federation": {"num_devices": 4, "sample_rate": 0.5, "rounds": 2},
            "tuning": {"num_tokens": 3},
            "selection": {"strategy": "all"},
            "device": {"epochs": 1, "learning_rate": 0.05},
            "server": {"method": "fedavg"},
            "evaluate": {"every": 1},
        }
        entry = {"source": str(source), "task": str(source / "task.yaml"), "max_length": 32}
        main = {
            "base": "base.yaml",
            "out": str(folder / "out"),
            "needs": ["sources.yaml"],
            "reference": "figures.csv",
            "prepare": {"moods": {"path": str(folder / "data/moods"), **entry}},
            "set": {"data.path": str(folder / "data/moods")},
            "grid": {
                "tuning.kind": {
                    "prompt_tuning": {"tuning.kind": "prompt_tuning"},
                    "attempt": {
                        "tuning.kind": "attempt",
                        "tuning.sources": [str(folder / "sources/kind=prompt_tuning/peft")],
                    },
                },
                "seed": [1, 2],
            },
            **changes,
        }
        other = {
            "base": "base.yaml",
            "out": str(folder / "sources"),
            "prepare": {"few": {"path": str(folder / "data/few"), **entry, "limit_train": 40}},
            "set": {"data.path": str(folder / "data/few"), "seed": 7},
            "grid": {"tuning.kind": ["prompt_tuning"]},
            **(needed or {}),
        }
        for name, values in (("base", base), ("experiment", main), ("sources", other)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        figures = "task,metric,statistic,value,source,tuning.kind\nmoods,accuracy,best global,0.25,Table 1,attempt\n"
        (folder / "figures.csv").write_text(figures)
        return folder / "experiment.yaml"

    return write


def start(path, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "fedhpc", "sweep", path, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def interrupt(path, phase, number):
    """Start, stop when it says that it is in this phase; all that it said."""
    process = start(path)
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if phase(said):
                process.send_signal(number)
                break
        said += process.communicate(timeout=TIMEOUT_S)[0].splitlines(keepends=True)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == EXIT_STOPPED, "".join(said)
    return "".join(said)


def tables(path):
    """Everything but the seconds and the folders of the exports."""
    return {
        name: [
            {key: value for key, value in row.items() if "seconds" not in key and key != "sources"}
            for row in csv.DictReader((path.parent / f"out/{name}.csv").open())
        ]
        for name in ("results", "report", "report.published")
    }


@pytest.fixture(scope="module")
def finished(write):
    """A sweep that ran from start to end."""
    path = write()
    process = start(path)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, out
    return path


PHASES = {
    "preparing": (lambda said: "prepare.few: preparing" in said[-1], signal.SIGTERM),
    "a needed cell": (lambda said: "cell 0 kind=prompt_tuning: begins" in said[-1], signal.SIGUSR1),
    "exporting": (lambda said: "exporting" in said[-1], signal.SIGINT),
    "a cell": (lambda said: "cell 1 kind=prompt_tuning,seed=2: begins" in said[-1], signal.SIGHUP),
    "the tables": (lambda said: "cell 3 kind=attempt,seed=2: done" in said[-1], signal.SIGUSR2),
}


def test_interrupted_once_in_every_phase_it_ends_with_the_same_tables(write, finished):
    path = write()
    folder = path.parent
    for phase, (is_there, number) in PHASES.items():
        said = interrupt(path, is_there, number)
        assert "stopped; the same command goes on from here" in said, phase
        left = [*folder.glob("data/*"), *folder.glob("sources/*/peft")]
        assert all((one / "description.json").exists() or (one / "README.md").exists() for one in left), phase
        assert not [*folder.rglob("*.new"), *folder.rglob("*.old")], phase
    process = start(path)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, out
    assert "preparing" not in out
    assert "exporting" not in out
    assert tables(path) == tables(finished)
    assert len(tables(path)["results"]) == 4
    (figure,) = tables(path)["report.published"]
    assert (figure["configuration"], figure["ours_n"], figure["published"]) == ("kind=attempt", "2", "0.25")


def test_a_stop_in_the_midst_of_writing_leaves_nothing(tmp_path):
    """The folder's name is there only when all of it is; what was there before stays until then."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "old").touch()
    stops = Stops()

    def work():
        with replacing(folder) as new:
            (new / "half").touch()
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(TIMEOUT_S)
        return 0

    with stops.listening():
        assert stops.aside(work) == EXIT_STOPPED
        assert stops.requested
        assert stops.aside(work) == EXIT_STOPPED  # not begun
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_a_dry_run_shows_every_phase_and_where_it_stands(write, finished, given, fedhpc):
    path = write()
    folder, source = path.parent, given / "all/moods"
    status, out, _ = fedhpc("sweep", path, "--dry-run")
    assert status == 0
    assert out.splitlines()[:-4] == [
        "prepared data:",
        f"to prepare  {folder / 'data/few'} from {source}",
        f"to prepare  {folder / 'data/moods'} from {source}",
        f"cells of {folder / 'sources.yaml'}:",
        f"0  not begun  {folder / 'sources/kind=prompt_tuning'}",
        "exports:",
        f"after its cell  {folder / 'sources/kind=prompt_tuning/peft'}",
        f"cells of {path}:",
    ]
    assert {path.suffix for path in folder.iterdir()} == {".yaml", ".csv"}
    _, out, _ = fedhpc("sweep", finished, "--dry-run", "--set", "federation.rounds=3")
    lines = out.splitlines()
    assert lines[1].split() == ["there", str(finished.parent / "data/few")]
    assert lines[4].startswith("0  round 2 of 3  ")  # its export is of the second round
    assert lines[6].startswith("after its cell")


def test_what_is_done_needs_nothing(finished, fedhpc):
    """Nor data, nor exports, nor needed cells."""
    data = finished.parent / "data"
    data.rename(finished.parent / "away")
    try:
        status, out, _ = fedhpc("sweep", finished)
    finally:
        (finished.parent / "away").rename(data)
    assert status == 0
    assert out.splitlines()[0] == "4 cells, 4 of them done"


def test_an_export_of_an_earlier_checkpoint_is_made_anew(finished, fedhpc):
    folder = finished.parent
    record = folder / "sources/kind=prompt_tuning/peft/checkpoint.sha256"
    one_more = ("--out", folder / "again", "--dry-run")  # whose needed cells are its own
    assert "after its cell" in fedhpc("sweep", finished, *one_more)[1]
    cell = load_experiment(finished).cells[2]
    aside = cell.run_dir.rename(folder / "aside")  # so that one cell is not done
    text = record.read_text()
    try:
        assert "\nthere  " in fedhpc("sweep", finished, "--dry-run")[1]
        record.write_text("of another run\n")
        assert "\nto be made anew  " in fedhpc("sweep", finished, "--dry-run")[1]
        record.unlink()  # made by hand
        assert "\nthere  " in fedhpc("sweep", finished, "--dry-run")[1]
    finally:
        record.write_text(text)
        aside.rename(cell.run_dir)


def test_a_needed_run_that_can_be_exported_no_more_is_said_before_anything_is_run(finished, fedhpc, tmp_path):
    needed = finished.parent / "sources/kind=prompt_tuning"
    gone = [load_experiment(finished).cells[2].run_dir, needed / "checkpoints", needed / "peft"]
    for path in gone:
        shutil.move(path, tmp_path / path.name)
    try:
        status, _, err = fedhpc("sweep", finished)
    finally:
        for path in gone:
            shutil.move(tmp_path / path.name, path)
    assert status == 2
    assert f"peft: cannot be exported, {needed} has no checkpoint any more; remove that folder" in err


def test_out_moves_needed_experiments_too(write):
    path = write()
    experiment = load_experiment(path, out="elsewhere")
    (needed,) = experiment.needs
    assert str(needed.out) == "elsewhere/needs/sources"
    attempt = experiment.cells[2]
    assert attempt.config.tuning.sources == ["elsewhere/needs/sources/kind=prompt_tuning/peft"]
    assert 'tuning.sources=["elsewhere/needs/sources/kind=prompt_tuning/peft"]' in attempt.overrides


def test_options_reach_needed_experiments_where_their_grid_does_not_vary_the_key(write):
    path = write(needed={"grid": {"device.epochs": [3]}, "set": {"tuning.kind": "prompt_tuning"}})
    options = ["model.name=other", "device.epochs=5", "prepare.few.limit_train=20"]
    experiment = load_experiment(path, options)
    (needed,) = experiment.needs
    assert needed.options == ("--set", "model.name=other", "--set", "prepare.few.limit_train=20")
    assert needed.cells[0].config.device.epochs == 3
    assert needed.prepare["few"].limit_train == 20
    assert experiment.cells[0].config.device.epochs == 5


def test_data_may_be_prepared_elsewhere_and_otherwise(write, given, fedhpc):
    path = write()
    options = ["prepare.moods.path=other/moods", "prepare.moods.limit_train=9", "prepare.few.seed=3"]
    options = [part for text in options for part in ("--set", text)]
    _, out, _ = fedhpc("sweep", path, "--dry-run", *options, "--sources", given / "all")
    assert f"to prepare  other/moods from {given / 'all/moods'}" in out
    experiment = load_experiment(path, options[1::2])
    assert experiment.prepare["moods"].limit_train == 9
    assert {cell.config.data.path for cell in experiment.cells} == {"other/moods"}
    assert experiment.needs[0].prepare["few"].seed == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["prepare.moods.max_length=16"], ["max_length: 32 there, 16 now"]),
        (["prepare.moods.limit_train=16"], ["limit_train: None there, 16 now", "seed: None there, 42 now"]),
        (["prepare.few.seed=5"], ["prepare.few: ", "data/few was made otherwise: seed: 42 there, 5 now"]),
        (
            ["tuning.head=linear"],
            ["head: verbalizer there, linear now", "template: {a} It was {word} . there, {a} now"],
        ),
    ],
)
def test_data_that_were_made_otherwise_are_refused(finished, fedhpc, options, words):
    options = [part for text in options for part in ("--set", text)]
    status, _, err = fedhpc("sweep", finished, "--out", finished.parent / "other", "--dry-run", *options)
    assert status == 2
    for word in words:
        assert word in err
    assert "remove it to have it made anew, or give another folder: --set prepare." in err


def test_data_of_another_tokenizer_are_refused(finished, given, fedhpc, tmp_path):
    tiny.write_backbone(tmp_path / "stranger")
    tokenizer = tmp_path / "stranger/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lovely"', '"lively"'))
    options = ("--set", f"model.name={tmp_path / 'stranger'}", "--out", tmp_path / "out", "--dry-run")
    status, _, err = fedhpc("sweep", finished, *options)
    assert status == 2
    assert f"tokenizer: that of {given / 'backbone'} there, that of {tmp_path / 'stranger'} now" in err


def test_data_of_an_older_version_are_taken(finished, fedhpc, tmp_path):
    """Which do not say what was selected; that there are more examples than asked for is seen all the same."""
    path = finished.parent / "data/moods/description.json"
    text = path.read_text()
    older = json.loads(text)
    del older["selected"]
    path.write_text(json.dumps(older))
    try:
        assert fedhpc("sweep", finished, "--out", tmp_path, "--dry-run")[0] == 0
        options = ("--set", "prepare.moods.limit_train=59")
        assert "limit_train: 60 there, 59 now" in fedhpc("sweep", finished, "--out", tmp_path, "--dry-run", *options)[2]
    finally:
        path.write_text(text)


PROBLEMS = {
    "an unknown key": (
        {"prepare": {"moods": {"path": "a", "source": "b", "sauce": "c"}}},
        ["prepare.moods.sauce: unknown key; valid here: path, source, task, model, head, overlong, max_length"],
    ),
    "a name that no file can have": ({"reference": "a\0b"}, ["reference: string should match pattern"]),
    "an entry without keys": ({"prepare": {"moods": 1}}, ["prepare.moods: should hold keys and values, found 1"]),
    "names without letters": (
        {"prepare": {"moods": {"path": "a", "source": "b", "task": "", "validation": ""}}},
        [f"prepare.moods.{key}: string should have at least 1 character" for key in ("task", "validation")],
    ),
    "no source": ({"prepare": {"moods": {"path": "a"}}}, ["prepare.moods.source: is required"]),
    "a wrong number": (
        {"prepare": {"moods": {"path": "a", "source": "b", "limit_train": 0}}},
        ["prepare.moods.limit_train: should be greater than 0, found 0"],
    ),
    "one folder twice": (
        {"prepare": {name: {"path": "a/b/", "source": "b", "task": "rte"} for name in ("one", "two")}},
        ["prepare: prepare.one and prepare.two both have the path a/b/"],
    ),
    "data that nobody prepares": (
        {"set": {"data.path": "nowhere"}},
        ["data.path: nowhere: no prepared data are there, and no entry of prepare: makes them (cell "],
    ),
    "a source that is nowhere": (
        {"prepare": {"x": {"path": "x", "source": "a/b/c", "task": "rte"}}, "set": {"data.path": "x"}},
        ["prepare.x: 'a/b/c': there is no folder /", "named OWNER/NAME or OWNER/NAME:CONFIGURATION"],
    ),
    "a task that is unknown": (
        {"prepare": {"x": {"path": "x", "source": "y"}}, "set": {"data.path": "x"}},
        ["prepare.x: task 'x' is neither a task file nor one of sst-2, mr"],
    ),
    "another task than the cells want": (
        {"prepare": {"rte": {"path": "x", "source": "y"}}, "set": {"data": {"path": "x", "task": "mr"}}},
        ["prepare.rte: makes data with rte, but its cells have data.task: mr (as kind=prompt_tuning,seed=1)"],
    ),
    "another length than the cells want": (
        {"prepare": {"rte": {"path": "x", "source": "y"}}, "set": {"data": {"path": "x", "max_length": 64}}},
        ["prepare.rte: makes data with 128, but its cells have data.max_length: 64"],
    ),
    "cells that disagree": (
        {
            "prepare": {"rte": {"path": "x", "source": "y"}},
            "set": {"data.path": "x"},
            "grid": {"model.name": ["a", "b"]},
        },
        ["prepare.rte: its cells have different model.name: a, b; give model:, or each a path"],
    ),
    "a source of prompts that is nowhere": (
        {"set": {"tuning": {"kind": "attempt", "sources": ["nowhere/peft"]}}, "grid": {"seed": [1]}},
        ["tuning.sources: nowhere/peft: is not there, and no cell of needs: is exported to it (cell seed=1)"],
    ),
    "a file that is not there": ({"needs": ["none.yaml"]}, ["none.yaml: cannot be read"]),
    "itself": ({"needs": ["experiment.yaml"]}, ["needs: is itself needed by another experiment"]),
    "a reference that is not there": ({"reference": "none.csv"}, ["none.csv: cannot be read"]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_faulty_experiment_is_refused_before_anything_is_made(write, fedhpc, problem):
    changes, messages = PROBLEMS[problem]
    path = write(**{"reference": None, **changes})
    status, _, err = fedhpc("sweep", path)
    assert status == 2
    for message in messages:
        assert message in err
    assert {file.suffix for file in path.parent.iterdir()} == {".yaml", ".csv"}


def test_prompts_come_of_prompt_tuning_alone(write, fedhpc):
    path = write(
        needed={"set": {"data.path": "x"}, "prepare": {}, "grid": {"kind": {"prompt_tuning": {"tuning.kind": "lora"}}}}
    )
    assert "its cell has tuning.kind: lora, prompt_tuning is needed" in fedhpc("sweep", path)[2]


def test_one_folder_is_not_prepared_in_two_ways(write, fedhpc):
    path = write()
    text = (path.parent / "sources.yaml").read_text()
    (path.parent / "sources.yaml").write_text(text.replace("data/few", "data/moods"))
    status, _, err = fedhpc("sweep", path, "--dry-run")
    assert status == 2
    assert f"prepare.moods.limit_train: None in {path}, but 40 for the same folder elsewhere" in err


def test_a_folder_has_many_names(write, fedhpc):
    path = write()
    folder, near = path.parent, os.path.relpath(path.parent)
    (folder / "data").mkdir()
    (folder / "linked").symlink_to("data")
    text = path.read_text().replace(f"path: {folder}/data/moods", f"path: {near}/linked/moods", 1)
    path.write_text(text.replace(f"- {folder}/sources", f"- {near}/sources"))
    status, out, err = fedhpc("sweep", path, "--dry-run")
    assert status == 0, err
    assert f"to prepare  {near}/linked/moods" in out
    assert f"after its cell  {folder}/sources/kind=prompt_tuning/peft" in out
    moved = load_experiment(path, [], str(folder / "moved"))
    assert moved.cells[2].config.tuning.sources == [str(moved.needs[0].cells[0].export)]
    path.write_text(text.replace(f"out: {folder}/out", f"out: {near}/sources"))
    assert "both have the out" in fedhpc("sweep", path, "--dry-run")[2]


def test_sources_are_a_folder_and_never_a_name_of_the_hub(write, fedhpc, tmp_path, monkeypatch):
    path = write()
    monkeypatch.chdir(tmp_path)
    for sources in ("nope", "."):
        status, _, err = fedhpc("sweep", path, "--dry-run", "--sources", sources)
        assert status == 2
        assert f"prepare.few: '{os.path.normpath(tmp_path / sources)}/moods': there is no folder" in err


def test_what_is_closed_is_said_with_its_entry_and_all_else(write, given, fedhpc, unprivileged):
    path = write()
    closed = shutil.copytree(given / "all/moods", path.parent / "closed")
    path.write_text(path.read_text().replace(f"source: {given}/all/moods", f"source: {closed}", 1))
    (path.parent / "sources.yaml").write_text(
        (path.parent / "sources.yaml").read_text().replace(f"source: {given}/all/moods", "source: nowhere/at/all")
    )
    for name, mode in (("closed/train.tsv", 0o600), ("closed", 0o700)):
        (path.parent / name).chmod(0)
        status, _, err = fedhpc("sweep", path, "--dry-run")
        (path.parent / name).chmod(mode)
        assert status == 2
        assert f"prepare.moods: {path.parent}/closed/" in err
        assert "Permission denied" in err
        assert "prepare.few: 'nowhere/at/all'" in err


def test_data_that_another_sweep_has_made_otherwise_meanwhile_are_not_taken(write):
    path = write(needs=[], grid={"seed": [1]})
    ours, same, other = (
        find_work(load_experiment(path, options), None).parts[0]
        for options in ([], [], ["prepare.moods.limit_train=9"])
    )
    make(ours)
    before = os.stat(ours.recipe.out)
    make(same)
    with pytest.raises(ConfigError, match="data/moods was made otherwise: limit_train: None there, 9 now"):
        make(other)
    assert os.path.samestat(before, os.stat(ours.recipe.out))


def test_options_for_entries_that_nobody_has_are_refused(write, fedhpc):
    status, _, err = fedhpc("sweep", write(), "--set", "prepare.mods.limit_train=9")
    assert status == 2
    assert "--set prepare.mods.limit_train: prepare: has no entry 'mods'; there are moods, few" in err
    status, _, err = fedhpc("sweep", write(), "--set", "prepare.moods.limt=9")
    assert status == 2
    assert "prepare.moods.limt: unknown key" in err


def test_an_array_waits_for_those_of_needed_experiments(write, finished, fedhpc, tmp_path, monkeypatch):
    """Data are prepared where the array is submitted."""
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/submitted\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write()
    (needed,) = load_experiment(path).needs
    command = f"--array=0-0 jobs/sweep.slurm {needed.path} --expect {needed.digest}".replace("0-0", "0")
    assert fedhpc("sweep", path, "--submit", "--dry-run")[1] == f"sbatch {command}\n"
    assert not (path.parent / "data").exists()
    status, out, _ = fedhpc("sweep", path, "--submit")
    assert status == 0
    assert (tmp_path / "submitted").read_text() == f"{command}\n"
    assert "these are needed first: when they have ended, run the same command again to go on" in out
    assert {folder.name for folder in (path.parent / "data").iterdir()} == {"few", "moods"}
    shutil.copytree(finished.parent / "sources/kind=prompt_tuning", needed.cells[0].run_dir)
    shutil.rmtree(needed.cells[0].export)
    status, out, _ = fedhpc("sweep", path, "--submit")
    assert status == 0
    assert (needed.cells[0].export / "checkpoint.sha256").is_file()
    assert f"--array=0-3 jobs/sweep.slurm {path} --expect" in (tmp_path / "submitted").read_text()


def test_a_needed_cell_that_fails_stops_nobody_who_does_not_need_it(write):
    path = write(needed={"base": "base.yaml", "set": {"data.path": "few", "federation.num_devices": 1000}})
    text = (path.parent / "sources.yaml").read_text()
    (path.parent / "sources.yaml").write_text(text.replace("data.path: few", f"data.path: {path.parent}/data/few"))
    process = start(path)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "FAILED: kind=prompt_tuning: failed with exit status 2, not begun" in out
    assert "FAILED: kind=attempt,seed=1: failed with exit status 2, not begun" in out
    assert [row["rounds"] for row in tables(path)["results"]] == ["2", "2", "0", "0"]


def test_texts_to_be_generated_are_prepared_once(write, tmp_path, fedhpc):
    source = tmp_path / "source"
    source.mkdir()
    lines = "".join(json.dumps({"prompt": f"the place was{n * ' and'}", "response": "great"}) + "\n" for n in range(40))
    (source / "train.jsonl").write_text(lines)
    task = {"task": "says", "kind": "generation", "splits": {"validation": "0.25"}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    entry = {"path": str(tmp_path / "says"), "source": str(source), "task": str(tmp_path / "task.yaml")}
    path = write(
        needs=[],
        reference=None,
        grid={"seed": [1]},
        prepare={"says": {**entry, "max_length": 20, "overlong": "drop"}},
        set={"data.path": entry["path"], "tuning.head": "language_model"},
    )
    (part,) = find_work(load_experiment(path, []), None).parts
    make(part)
    make(part)
    for option, words in (
        ("overlong=cut-prompt", "overlong: drop there, cut-prompt now"),
        ("seed=1", "seed: 42 there, 1 now"),
        ("max_length=24", "max_length: 20 there, 24 now"),
        ("head=linear", "prepare.says: head linear does not apply: task says is of texts to be generated"),
    ):
        status, _, err = fedhpc("sweep", path, "--dry-run", "--set", f"prepare.says.{option}")
        assert (status, words in err) == (2, True), err
    _, _, err = fedhpc("sweep", path, "--dry-run", "--set", "tuning.head=linear")
    assert "makes data with language_model, but its cells have tuning.head: linear" in err
    for key, value in (("template", "{prompt} so "), ("splits", {"validation": "0.5"}), ("device", "prompt")):
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, key: value}))
        status, _, err = fedhpc("sweep", path, "--dry-run")
        name = "held_back" if key == "splits" else key
        assert (status, f"says was made otherwise: {name}: " in err) == (2, True), err
