"""Written answers at an evaluation: of which prompts, how they are scored, after a stop, on any number of ranks."""

import json
import os
import signal
import sys
from pathlib import Path

import generating
import numpy as np
import pytest
import tiny
from tiny import metrics, run_dir

from fedhpc.commands import cli
from fedhpc.config.file import load_config
from fedhpc.data.prepared import PreparedData
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR
from fedhpc.evaluate.generation_metrics import ExactMatch, TokenF1
from fedhpc.evaluate.questions import Questions, prompt_of
from fedhpc.exchange import LocalExchange
from fedhpc.federation.sampling import held_out_devices
from fedhpc.job.run_files import RunFiles
from fedhpc.registry import RECORDED
from fedhpc.server.job import load_job

sys.path.append(str(Path(__file__).parents[1] / "mpi"))
from launch import MPIRUN, mpirun

NUM_QUESTIONS = 7


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """Backbone, prepared data and configuration; not to be changed."""
    return generating.write_world(tmp_path_factory.mktemp("moods"))


@pytest.fixture(scope="module")
def finished(moods):
    """The configuration of a run that ended; not to be changed."""
    assert cli.main(["run", str(moods)]) == 0
    return moods


def generations(config):
    """The bytes of each file of answers."""
    return {path.name: path.read_bytes() for path in sorted((run_dir(config) / "generations").iterdir())}


def lines_of(content):
    return [json.loads(line) for line in content.splitlines()]


def test_every_evaluation_writes_its_answers_and_scores_them(finished):
    found = generations(finished)
    assert list(found) == ["round_000000.jsonl", "round_000001.jsonl"]
    data = PreparedData.open(load_config(finished).data.path, verify=False).split("validation")
    job = load_job(load_config(finished))
    for record, content in zip(metrics(finished), found.values(), strict=True):
        lines = lines_of(content)
        assert len(lines) == NUM_QUESTIONS
        assert [line["example"] for line in lines] == sorted({line["example"] for line in lines})
        for line in lines:
            assert line["example"] in job.partition.validation[line["device"]]
            twins = [
                i for i in range(len(data)) if np.array_equal(prompt_of(data, i), prompt_of(data, line["example"]))
            ]
            assert len(line["references"]) == len(twins) >= 2
            assert set(line["references"]) <= {"terrible", "great", "okay", "fine"}
            assert line["prompt"].startswith("<s> the place was")
            assert line["prompt"].endswith("It was")
            assert generating.END not in line["answer"]
        names = {key.removesuffix("_global") for key in record}
        assert {"accuracy", "perplexity", "exact_match", "token_f1"} <= names <= {*RECORDED, "exact_match", "token_f1"}
        references = [line["references"] for line in lines]
        for key, behind in (("answer", "_global"), ("answer_personal", "")):
            answers = [line[key] for line in lines]
            assert record[f"token_f1{behind}"] == TokenF1().score(answers, references)
            assert record[f"exact_match{behind}"] == ExactMatch().score(answers, references)
    assert any(line["answer"] != line["answer_personal"] for content in found.values() for line in lines_of(content))


def test_answers_of_devices_that_never_train_are_scored_apart(moods, tmp_path):
    config = tiny.write_config(
        moods, tmp_path, "apart", federation__held_out=0.5, federation__rounds=1, evaluate__generate=20
    )
    assert cli.main(["run", str(config)]) == 0
    ((record,), (content,)) = metrics(config), generations(config).values()
    held_out = held_out_devices(load_config(config))
    assert len(held_out) == 3

    def f1(key, *, apart):
        lines = [line for line in lines_of(content) if (line["device"] in held_out) == apart]
        return TokenF1().score([line[key] for line in lines], [line["references"] for line in lines])

    assert record["token_f1"] == f1("answer_personal", apart=False)
    assert record["token_f1_global"] == f1("answer", apart=False)
    assert record["token_f1_held_out"] == f1("answer", apart=True) != record["token_f1_global"]


def test_prompts_are_of_each_category_its_share(finished):
    job = load_job(load_config(finished))
    split = job.data.split("validation")
    every = Questions(split, job.partition.validation, count=10**6, seed=0)
    assert sorted(example for group in every.sharing for example in group) == list(range(len(split)))
    some = Questions(split, job.partition.validation, count=len(every) // 2, seed=0)
    all_of, half_of = (np.bincount(split.labels[own.examples], minlength=3) for own in (every, some))
    assert (abs(half_of - all_of / 2) <= 1).all()
    others = Questions(split, [np.arange(4)], count=10**6, seed=0)
    assert set(others.examples) <= set(range(4))


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")
def test_three_ranks_write_the_same_bytes(moods, finished, tmp_path):
    config = tiny.write_config(moods, tmp_path, "three")
    done = mpirun(4, "-m", "fedhpc", "run", config)
    assert done.returncode == 0, done.stderr
    assert generations(config) == generations(finished)
    names = ("token_f1", "token_f1_global", "accuracy", "perplexity")
    assert [[r[name] for name in names] for r in metrics(config)] == [
        [r[name] for name in names] for r in metrics(finished)
    ]


def test_a_stop_ends_a_batch_of_answers_and_the_evaluation_is_repeated(moods, finished, tmp_path, monkeypatch):
    config = tiny.write_config(moods, tmp_path, "stopped")
    beat, tokens = LocalExchange.beat, []

    def stopping_beat(exchange, activity):
        if activity == "generating":
            tokens.append(activity)
            if len(tokens) == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
        beat(exchange, activity)

    monkeypatch.setattr(LocalExchange, "beat", stopping_beat)
    assert cli.main(["run", str(config)]) == EXIT_STOPPED
    assert len(tokens) == 3
    assert not (run_dir(config) / "generations").exists()
    assert not (run_dir(config) / "metrics.jsonl").exists()
    assert cli.main(["run", str(config)]) == 0
    assert generations(config) == generations(finished)


def test_answers_that_nobody_goes_on_from_are_put_aside(tmp_path):
    files = RunFiles(tmp_path)
    files.generations.mkdir()
    (tmp_path / "generations.1").mkdir()
    files.metrics.write_text("{}\n")
    assert files.begin_anew() == tmp_path / "metrics.2.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generations.1", "generations.2", "metrics.2.jsonl"]


def test_drawn_answers_are_drawn_again_alike(moods, tmp_path):
    warm = {"every": 1, "generate": 3, "max_new_tokens": 4, "temperature": 1.5, "top_p": 0.9}
    configs = [
        tiny.write_config(moods, tmp_path, run, evaluate={**warm, "batch_size": size}, federation__rounds=1)
        for run, size in (("one", 1), ("many", 8))
    ]
    for config in configs:
        assert cli.main(["run", str(config)]) == 0
    assert generations(configs[0]) == generations(configs[1])


def refusal(capfd, config):
    capfd.readouterr()
    assert cli.main(["run", str(config)]) == EXIT_USER_ERROR
    return capfd.readouterr().err


def test_what_cannot_be_answered_is_refused_before_training(moods, world, tmp_path, capfd, monkeypatch):
    long = tiny.write_config(moods, tmp_path, "long", evaluate__max_new_tokens=60)
    assert "evaluate.max_new_tokens: 60" in (message := refusal(capfd, long))
    assert "64 positions" in message
    assert "at most" in message
    classes = tiny.write_config(world, tmp_path, "classes", evaluate__generate=3)
    assert "evaluate.generate: data.path was prepared for classification (moods)" in refusal(capfd, classes)
    drawn = tiny.write_config(moods, tmp_path, "drawn", evaluate__top_p=0.5)
    assert "evaluate.top_p below 1 needs evaluate.temperature above 0" in refusal(capfd, drawn)
    for name, package in (("rouge_l", "rouge_score"), ("bleu", "sacrebleu")):
        monkeypatch.setitem(sys.modules, package, None)
        folder = tmp_path / name
        folder.mkdir()
        scored = generating.write_world(folder, metrics=[name])
        assert f"the metric {name} needs the package" in refusal(capfd, scored)
    texts = tmp_path / "texts"
    texts.mkdir()
    whole = generating.write_world(texts, format="text", template=None, metrics=None, columns={"text": "prompt"})
    assert "task moods-chat has whole texts (format: text), no prompts; set evaluate.generate: 0" in refusal(
        capfd, whole
    )
    for config in (long, classes, drawn, whole):
        assert not (run_dir(config) / "metrics.jsonl").exists()
