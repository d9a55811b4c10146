"""`fedhpc report`: the page, its numbers, and the tables beside it."""

import csv
import json
import re
from html.parser import HTMLParser

import generating
import pytest
import yaml
from tiny import run_dir

from fedhpc.commands.report import read_reference, read_run, write_report
from fedhpc.commands.report.groups import group_runs
from fedhpc.commands.report.parts import _series
from fedhpc.commands.report.units import unit_for
from fedhpc.errors import CheckpointError, ReportError
from fedhpc.evaluate.metrics import Metric
from fedhpc.registry import METRICS

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """A page's tables by caption, best cells as **cell**, and whatever is not well-formed in it."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text()
        self.tables, self.open, self.faults, self.links = {}, [], [], []
        self.words, self.row, self.caption = "", [], ""
        self.feed(self.text)
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag in ("th", "td", "caption"):
            self.words = ""
        elif tag == "tr":
            self.row = []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")
        if tag == "caption":
            self.caption = self.words
            self.tables[self.caption] = []
        elif tag == "strong":
            self.words = f"**{self.words}**"
        elif tag in ("th", "td"):
            self.row.append(self.words)
        elif tag == "tr":
            self.tables[self.caption].append(self.row)

    def handle_data(self, data):
        self.words += data


def record(round_index, accuracy=None, **values):
    return {
        "round": round_index,
        "steps": 30,
        "loss": 2 / (round_index + 1),
        "accuracy": accuracy,
        "accuracy_global": accuracy,
        "bytes": 1_000_000,
        "seconds": {"broadcast": 0.5, "local": 1.0, "idle": 0.25, "gather": 0.5, "round": 2.0},
        **values,
    }


@pytest.fixture
def make_run(tmp_path):
    """Write a run directory with one evaluation every two rounds; None: no metrics at all.

    `extra`: more of an evaluation's metrics, or what gives them for each evaluation.
    """

    def make(name, accuracies, rounds=4, extra=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "run_dir": str(folder),
            "seed": 1,
            "model": {"name": "some/model"},
            "data": {"path": str(tmp_path / "prepared"), "task": "moods"},
            "federation": {"num_devices": 10, "rounds": rounds},
            "server": {"method": "fedavg"},
        }
        for key, value in changes.items():
            section, _, leaf = key.rpartition("__")
            (config.setdefault(section, {}) if section else config)[leaf] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if accuracies is not None:
            lines = []
            for index, accuracy in enumerate(accuracies):
                evaluated = record(2 * index + 1, accuracy, **(extra(index) if callable(extra) else extra or {}))
                lines += [record(2 * index), evaluated]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.fixture
def report(tmp_path):
    def write(*folders, target=None, rounds=None, budget_bytes=None):
        out = tmp_path / "page.html"
        runs = [read_run(folder, rounds=rounds, budget_bytes=budget_bytes) for folder in folders]
        write_report(runs, out, target, budget_bytes)
        return Page(out)

    return write


@pytest.fixture
def two_methods(make_run):
    """Final accuracies 0.7, 0.8, 0.9: mean 0.8, squares of 0.1, 0, 0.1, so 0.1; and 0.85, 0.87: 0.86, 0.01 sqrt 2."""
    seeds = enumerate(([0.5, 0.7], [0.5, 0.8], [0.5, 0.9]))
    averaged = [make_run(f"a{seed}", accuracies, seed=seed) for seed, accuracies in seeds]
    better = [
        make_run(f"b{seed}", [0.84, final], seed=seed, server__method="fedpeptao")
        for seed, final in ((7, 0.85), (8, 0.87))
    ]
    return [*averaged, *better]


def test_runs_that_differ_in_seed_alone_are_one_row_with_mean_and_deviation(report, two_methods):
    head, *rows = report(*two_methods).tables["final results"]
    # The loss of the fourth round is 2/4.
    assert head == ["configuration", "runs", "accuracy", "accuracy, global", "training loss"]
    assert rows == [
        [
            "method=fedavg",
            "3",
            "0.800 ± 0.100",
            "0.800 ± 0.100",
            "0.500 ± 0.000",
        ],  # the loss of the fourth round is 2/4
        ["method=fedpeptao", "2", "0.860 ± 0.014", "0.860 ± 0.014", "0.500 ± 0.000"],
    ]


def test_what_has_fewer_seeds_is_not_compared(report, two_methods, make_run):
    page = report(*two_methods)
    assert "only configurations with 3 finished runs are compared" in page.text
    page = report(*two_methods, make_run("third", [0.8, 0.89], seed=9, server__method="fedpeptao"))
    assert [row[2] for row in page.tables["final results"][1:]] == ["0.800 ± 0.100", "**0.870 ± 0.020**"]
    assert "are compared" not in page.text


def test_a_repeated_run_is_no_seed_more(report, make_run):
    runs = [make_run(name, [0.5, 0.6], seed=1) for name in "ab"] + [make_run("c", [0.5, 0.8], seed=2)]
    assert report(*runs).tables["final results"][1][1:3] == ["3, of 2 seed(s)", "0.700 ± 0.141"]


def test_a_line_is_the_mean_of_the_same_seeds_at_each_point(make_run):
    # Evaluated after rounds 2 and 4; and, the other one, after round 4 alone.
    often, seldom = make_run("a", [0.9, 0.5], seed=1), make_run("b", [None, 0.7], seed=2)
    ((group,),) = group_runs([read_run(often), read_run(seldom)]).values()
    line = _series(0, group, "accuracy", "rounds")
    assert (line.x.tolist(), line.y.tolist()) == ([4], [0.6])


def test_nothing_is_reached_where_nothing_is_learnt(report, make_run):
    page = report(make_run("a", [0.0, 0.0]), make_run("b", [0.0, 0.0], server__method="mime"))
    assert not [title for title in page.tables if title.startswith("cost to reach")]


def test_cost_of_the_whole_run(report, two_methods):
    # Four rounds of 30 steps, 1 MB and 2 s.
    assert report(*two_methods).tables["cost of the whole run"] == [
        ["configuration", "rounds", "local steps", "bytes (MB)", "time (s)"],
        ["method=fedavg", "4.0 ± 0.0", "120 ± 0", "4.00 ± 0.00", "8.00 ± 0.00"],
        ["method=fedpeptao", "4.0 ± 0.0", "120 ± 0", "4.00 ± 0.00", "8.00 ± 0.00"],
    ]


def test_cost_to_reach_a_target(report, two_methods):
    # 0.8 is reached by two of the three after four rounds, and by fedpeptao at the first evaluation, after two.
    page = report(*two_methods, target=0.8)
    _, averaged, better = page.tables["cost to reach accuracy 0.800"]
    reached = ["4.0 ± 0.0", "120 ± 0", "4.00 ± 0.00", "8.00 ± 0.00"]
    assert averaged == ["method=fedavg", *(f"{cost} (2 of 3)" for cost in reached)]
    assert better == ["method=fedpeptao", "2.0 ± 0.0", "60 ± 0", "2.00 ± 0.00", "4.00 ± 0.00"]


def test_methods_are_compared_after_equally_many_bytes_too(report, make_run):
    # The second run's two rounds up to an evaluation move 1 MB and 3 MB: 4 MB before the first, 8 MB at the end.
    dear = {"bytes": 3_000_000}
    head, *rows = report(
        make_run("a", [0.5, 0.6]), make_run("b", [0.55, 0.9], extra=dear, server__method="mime")
    ).tables["final results"]
    columns = head.index("accuracy"), head.index("accuracy within 4.00 MB")
    assert [[row[column] for column in columns] for row in rows] == [["0.600", "**0.600**"], ["**0.900**", "0.550"]]


def test_a_budget_of_bytes_ends_every_run(report, make_run):
    dear = make_run("b", [0.55, 0.9], extra={"bytes": 3_000_000}, server__method="mime")  # 1, 4, 5 and 8 MB
    page = report(make_run("a", [0.5, 0.6]), dear, budget_bytes=4.5e6)
    head, *rows = page.tables["final results"]
    assert [row[head.index("accuracy")] for row in rows] == ["**0.600**", "0.550"]
    assert [row[1] for row in rows] == ["1", "1"]  # that is all there is to see of them
    assert "up to its last round within 4.50 MB." in page.text


def test_the_target_is_95_percent_of_the_best_unless_given(report, two_methods):
    assert "cost to reach accuracy 0.855" in report(*two_methods).tables  # 0.95 * 0.9


def test_the_best_round_stands_beside_the_last_and_the_papers_clock_beside_the_wall(report, make_run):
    # Evaluated after rounds 2, 4, 6; every other line is of a round without evaluation.
    extra = {"seconds": {"local": 40.0, "idle": 5.0, "slowest_device": 30.0, "round": 50.0}, "accuracy_global": 0.25}
    page = report(
        make_run("a", [0.5, 0.9, 0.7], rounds=6, extra=extra), make_run("b", [0.5, 0.6, 0.8], rounds=6, seed=2)
    )
    assert page.tables["best round"] == [
        ["configuration", "accuracy", "accuracy, global", "after round"],
        ["kind=prompt, method=fedavg", "0.850 ± 0.071", "0.525 ± 0.389", "4.0 ± 2.8"],
    ]
    heading, row = page.tables["cost of the whole run"]
    # Three rounds of 30 s; the other run does not know.
    assert row[heading.index("time of slowest devices (s)")] == "90.0 (1 of 2)"


def test_configurations_are_compared_seed_by_seed(report, make_run):
    best = [make_run(f"best{seed}", [value], seed=seed) for seed, value in ((1, 0.9), (2, 0.7), (3, 0.8))]
    near = [
        make_run(f"near{seed}", [value], seed=seed, server__method="fedprox")
        for seed, value in ((1, 0.88), (2, 0.66), (3, 0.8), (4, 0.1))
    ]
    lucky = make_run("one", [0.99], server__method="scaffold")  # of one seed: nothing to compare with
    page = report(*best, *near, lucky, rounds=2)
    # Differences -0.02, -0.04, 0: mean -0.02, deviation 0.02; (1.96 + 0.84)^2 (0.02 / 0.02)^2 + 1.96^2 / 2 seeds, which
    # are the 10 of the noncentral t distribution (power 0.80; of 8 it were 0.68).
    assert page.tables["difference to method=fedavg, seed by seed"] == [
        ["configuration", "accuracy", "seeds", "seeds to tell them apart"],
        ["method=fedprox", "-0.020 ± 0.020", "3", "10"],
    ]


def test_how_steady_a_run_is_at_its_end(report, make_run):
    heading, row = report(make_run("a", [0.9, 0.1, 0.2, 0.3, 0.4, 0.5], rounds=12)).tables["best round"]
    assert heading[-1] == "deviation of accuracy, global, over the last five evaluations"
    assert row[-1] == "0.158"  # of 0.1 to 0.5
    heading, _ = report(make_run("b", [0.9, 0.4], rounds=4)).tables["best round"]
    assert heading[-1] == "after round"


def test_tables_are_also_csv_and_latex(report, two_methods, make_run, tmp_path):
    report(*two_methods)
    averaged, better = csv.DictReader((tmp_path / "page.csv").open())
    assert averaged["task"] == "moods"
    assert (averaged["method"], averaged["runs"], averaged["finished"]) == ("fedavg", "3", "3")
    assert float(averaged["accuracy_mean"]) == pytest.approx(0.8)
    assert float(averaged["accuracy_sd"]) == pytest.approx(0.1)
    assert float(better["bytes_mean"]) == 4_000_000
    assert better["rounds_to_target_n"] == "1"  # 0.87 of 0.85 and 0.87
    assert better["rounds_to_target_sd"] == ""
    report(*two_methods, make_run("third", [0.8, 0.89], seed=9, server__method="fedpeptao"))
    latex = (tmp_path / "page.tex").read_text()
    assert r"method=fedpeptao & 3 & \textbf{0.870 $\pm$ 0.020} &" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5


def test_the_page_needs_no_network_and_is_well_formed(report, two_methods):
    page = report(*two_methods)
    assert page.faults == []
    assert page.links == ["#task-1"]
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", page.text)
    assert page.text.count('class="chart"') == 4  # accuracy by round, bytes and time, and loss
    pictures = re.findall(r'<svg[^>]*role="img"[^>]*', page.text)
    assert len(pictures) >= 4
    assert all(re.search(r'aria-label="[^"]', picture) for picture in pictures)


def test_names_are_text_and_nothing_else(report, make_run, tmp_path):
    name = '<script>alert("1")</script> & 50%_x'
    page = report(make_run("a", [0.5]), make_run("b", [0.6], model__name=name))
    assert page.faults == []
    assert "<script>" not in page.text
    assert f"name={name}" in [row[0] for row in page.tables["Configurations"]]
    assert r"50\%\_x" in (tmp_path / "page.tex").read_text()


def test_unfinished_runs_are_shown_marked_and_not_counted_beside_finished_ones(report, make_run):
    page = report(
        make_run("a1", [0.5, 0.7], seed=1),
        make_run("a2", [0.9], seed=2),
        make_run("b", [0.95], server__method="fedprox"),
        make_run("c", None, server__method="scaffold"),
        make_run("d", [0.5, 0.6], server__method="mime"),
    )
    _, *rows = page.tables["final results"]
    assert [row[:3] for row in rows] == [
        ["method=fedavg", "1 of 2 finished", "**0.700**"],
        ["method=fedprox\u00a0†", "0 of 1 finished", "0.950"],
        ["method=scaffold\u00a0†", "0 of 1 finished", "–"],
        ["method=mime", "1", "0.600"],
    ]
    assert [row[-1] for row in page.tables["Runs"] if row[0].endswith("/a2")] == ["2 of 4, unfinished"]
    assert "<strong>3 unfinished</strong>" in page.text


def test_a_run_that_has_just_begun(report, make_run):
    page = report(make_run("a", None))
    assert page.faults == []
    assert "Nothing has been recorded yet." in page.text


def test_prepared_data_that_are_gone_leave_a_note(report, make_run, tmp_path):
    page = report(make_run("a", [0.5, 0.6]))
    assert f"left out: {tmp_path / 'prepared'} is no directory" in page.text


def test_devices_beside_each_other(report, make_run):
    # Of 20 known devices the worst two have 0 and 0.1, the best two 0.9 and 1. Mean 0.5; the others are at 0.5, so the
    # variance is (2 * 0.25 + 2 * 0.16) / 20 = 0.041.
    devices = [0.5] * 8 + [None, 0.0, 1.0, 0.1, 0.9] + [0.5] * 8
    page = report(make_run("a", [0.5, 0.6], extra={"device_accuracy": devices}))
    assert page.tables["accuracy by device"][1] == [
        page.tables["final results"][1][0],
        "0.500",
        "0.202",
        "0.050",
        "0.950",
    ]


def test_waiting_is_not_counted_as_local_work_too(report, make_run):
    head, row = report(make_run("a", [0.5, 0.6])).tables["time of a round by phase"]
    times = dict(zip(head, row, strict=True))
    assert times["local work (ms)"] == "750"
    assert times["waiting for others (ms)"] == "250"


def test_a_tasks_own_metric_leads(report, make_run):
    better = {"matthews": 0.4, "matthews_global": 0.3}
    page = report(make_run("a", [0.5, 0.7], extra=better))
    assert page.tables["final results"][0][2:6] == [
        "Matthews correlation",
        "Matthews correlation, global",
        "accuracy",
        "accuracy, global",
    ]
    assert page.tables["final results"][1][2:6] == ["0.400", "0.300", "0.700", "0.700"]
    assert "cost to reach Matthews correlation 0.380" in page.tables
    assert "global Matthews correlation by round" in page.text


def of_texts(*perplexities, **others):
    """Metrics of an evaluation of generated text; the server's perplexity is 1 more, that of held-out devices 2."""
    return lambda index: {
        "accuracy_held_out": 0.25,
        "perplexity": perplexities[index],
        "perplexity_global": perplexities[index] + 1,
        "perplexity_held_out": perplexities[index] + 2,
        "rouge_l": 0.5,
        "rouge_l_global": 0.375,
        **others,
    }


def test_of_perplexity_less_is_better(report, make_run, tmp_path):
    """Everywhere: last, best round, target, cost, bold, and in what order configurations stand."""
    page = report(
        make_run("a", [0.1, 0.2, 0.3], rounds=6, extra=of_texts(30, 10, 20)),
        make_run("b", [0.1, 0.2, 0.4], rounds=6, extra=of_texts(40, 30, 15), server__method="fedprox"),
    )
    head, one, other = page.tables["final results"]
    views = ("", ", global", ", held-out devices")
    assert head[2:-1] == [
        *(f"perplexity{view}" for view in views),
        *(f"token accuracy{view}" for view in views),
        *("ROUGE-L", "ROUGE-L, global"),
    ]
    assert one[2:8] == ["20.000", "21.000", "22.000", "0.300", "0.300", "**0.250**"]
    assert other[2:8] == ["**15.000**", "**16.000**", "**17.000**", "**0.400**", "**0.400**", "**0.250**"]
    assert page.tables["best round"][1:] == [
        ["method=fedavg", "**10.000**", "**11.000**", "**12.000**", "4.0"],
        ["method=fedprox", "15.000", "16.000", "17.000", "6.0"],
    ]
    # 5 % more than the best final value, 15, which the first one has been below after four rounds.
    cost = page.tables["cost to reach perplexity 15.750"]
    assert [row[1] for row in cost] == ["rounds", "**4.0**", "6.0"]
    assert page.text.count("perplexity: less is better") == 2
    charts = re.findall(r"<figcaption>([^<]*)</figcaption><svg", page.text)
    assert charts == [
        *("perplexity by round", "perplexity by bytes moved", "perplexity by time", "global perplexity by round"),
        *("perplexity of held-out devices by round", "token accuracy by round", "ROUGE-L by round"),
        "training loss by round",
    ]
    one, other = csv.DictReader((tmp_path / "page.csv").open())
    assert (one["best_perplexity_mean"], other["perplexity_held_out_mean"]) == ("10.0", "17.0")
    latex = (tmp_path / "page.tex").read_text()
    assert r"fedprox & 1 & \textbf{15.000} & \textbf{16.000} & \textbf{17.000} &" in latex


def test_the_best_of_perplexity_is_what_others_are_compared_with(report, make_run):
    """The best is 10 and 12; 13 and 14 are 3 and 2 more."""
    values = {"fedavg": (13, 14), "fedprox": (10, 12)}
    runs = [
        make_run(f"{name}{seed}", [0.5], rounds=2, extra=of_texts(value), seed=seed, server__method=name)
        for name, both in values.items()
        for seed, value in enumerate(both)
    ]
    assert report(*runs).tables["difference to method=fedprox, seed by seed"][1][:2] == [
        "method=fedavg", "+2.500 ± 0.707"
    ]  # fmt: skip


def test_scores_of_which_less_is_better_have_no_mean_with_others(report, make_run):
    texts = [
        make_run(name, [0.5, 0.6], data__task="chat", extra=of_texts(9, last), server__method=name)
        for name, last in (("fedavg", 8), ("fedprox", 6))
    ]
    classes = [
        make_run(f"{name}2", [0.5, last], server__method=name) for name, last in (("fedavg", 0.8), ("fedprox", 0.6))
    ]
    page = report(*texts, *classes)
    assert page.tables["final scores, personalised"] == [
        ["configuration", "chat (perplexity)", "moods"],
        ["method=fedavg", "8.000", "**0.800**"],
        ["method=fedprox", "**6.000**", "0.600"],
    ]
    assert "accuracy_held_out" not in report(*classes).text


def test_a_plug_ins_metric_says_which_direction_is_better(report, make_run, monkeypatch):
    class Errors(Metric):
        less_is_better = ("errors",)

        def scores(self, counts, accuracy):
            return {"errors": 1 - accuracy}

    monkeypatch.setitem(METRICS._parts, "errors", Errors)
    runs = [
        make_run(name, [0.5], rounds=2, extra={"errors": errors, "errors_global": errors}, server__method=name)
        for name, errors in (("fedavg", 0.25), ("fedprox", 0.75))
    ]
    head, one, _ = report(*runs).tables["final results"]
    assert (head[2], one[2]) == ("errors", "**0.250**")


def test_a_number_that_no_run_can_have_is_none(report, make_run):
    page = report(make_run("a", [0.5, 0.6], extra=of_texts(10**400, 7)))
    assert page.tables["best round"][1][1] == "7.000"


def write_answers(folder, round_index, lines):
    """A file of answers; what is no mapping is written as it is."""
    (folder / "generations").mkdir(exist_ok=True)
    default = {"device": 3, "prompt": "Why?", "references": ["Because."], "answer": "So.", "answer_personal": "So."}
    texts = [json.dumps(default | line) if isinstance(line, dict) else line for line in lines]
    (folder / "generations" / f"round_{round_index:06d}.jsonl").write_text("\n".join(texts) + "\n")


def test_written_answers_are_shown_by_round_with_their_scores(report, make_run):
    folder = make_run("a", [0.5, 0.6], extra=of_texts(9, 8, exact_match=0.5, exact_match_global=0.5, bleu_global=0.5))
    write_answers(folder, 1, [{"example": 4}, {"example": 7, "answer": "because", "answer_personal": "because"}])
    write_answers(folder, 3, [{"example": 4, "answer_personal": "Because!"}, {"example": 7, "references": ["a", "b"]}])
    page = report(folder)
    head, one, other = page.tables["written answers, kind=prompt, method=fedavg"]
    assert head == ["example", "prompt", "reference", "answer"]
    words = [[" ".join(cell.split()) for cell in row] for row in (one, other)]
    scores = "ROUGE-L 0.00, exact match 0.00"
    assert words == [
        ["4 device 3", "Why?", "Because.", f"after round 2: {scores} So. after round 4: {scores} So. "
         "device 3's own: ROUGE-L 1.00, exact match 1.00 Because! none after this round"],
        ["7 device 3", "Why?", "a b", "after round 2: ROUGE-L 1.00, exact match 1.00 because "
         f"after round 4: {scores} So. none after this round"],
    ]  # fmt: skip
    assert re.findall(r'<option value="([^"]*)"( selected)?>', page.text) == [("2", ""), ("4", " selected"), ("", "")]
    assert page.faults == page.links[1:] == []
    assert page.text.count("<script>") == 1
    assert not re.search(r"https?:|//|@import|url\(|<link", page.text)


def test_answers_are_text_and_nothing_else_and_no_more_than_fit_on_a_page(report, make_run):
    folder = make_run("a", [0.5] * 9, rounds=18, extra={"perplexity_global": 3})
    evil = '</div></script><script>alert("1")</script>\0\x1b[31m'
    for index in range(1, 18, 2):
        lines = [{"example": number, "answer": evil, "prompt": "x" * 2300} for number in range(30)]
        write_answers(
            folder, index, [*lines, "", "[1]", '{"example": 1}', {"example": 40, "references": []}, "[" * 9999]
        )
    write_answers(folder, 5, [{"example": 1, "answer": "of a round that is not shown"}])
    page = report(folder)
    assert page.faults == []
    assert page.text.count("<script>") == 1
    (table,) = (rows for title, rows in page.tables.items() if title.startswith("written answers"))
    assert [row[0].split()[0] for row in table[1:]] == [str(number) for number in range(20)]
    assert "The first 20 of 30 prompts, 6 of 9 evaluations" in page.text
    shown = [2, 6, 8, 12, 14, 18]  # of 2, 4, ..., 18, where that after 6 rounds has other answers
    assert re.findall(r'<option value="(\d+)"', page.text) == [str(done) for done in shown]
    assert '</div></script><script>alert("1")</script>\u2400\u241b[31m' in table[1][3]
    assert f"{'x' * 1000}\n[… 300 characters left out …]\n{'x' * 1000}" in table[1][1]
    assert len(page.text) < 300_000


def test_answers_of_a_real_run(fedhpc, tmp_path):
    config = generating.write_world(tmp_path)
    assert fedhpc("run", config)[0] == 0
    assert fedhpc("report", run_dir(config), "--out", tmp_path / "page.html")[0] == 0
    page = Page(tmp_path / "page.html")
    assert page.faults == []
    assert {"perplexity", "token accuracy, global", "exact match", "token F1, global"} <= {
        *page.tables["final results"][0]
    }
    (table,) = (rows for title, rows in page.tables.items() if title.startswith("written answers"))
    lines = (run_dir(config) / "generations" / "round_000001.jsonl").read_text().splitlines()
    for line, row in zip(map(json.loads, lines), table[1:], strict=True):
        assert line["prompt"] in row[1]
        assert line["answer"] in row[3].partition("after round 2: exact match ")[2]


def test_tasks_are_not_merged_by_a_name_that_is_not_theirs(report, make_run):
    of_accuracy = {"data__task": None, "data__path": "sst2/prepared"}
    of_matthews = {"extra": {"matthews": 0.4, "matthews_global": 0.3}}
    page = report(
        make_run("a", [0.5, 0.9], **of_accuracy),
        make_run("b", [0.5, 0.7], data__task=None, data__path="cola/prepared", **of_matthews),
    )
    # 95 % of 0.9, and of 0.4.
    assert {"cost to reach accuracy 0.855", "cost to reach Matthews correlation 0.380"} <= page.tables.keys()
    assert {"sst2/prepared", "cola/prepared"} <= {row[1] for row in page.tables["Runs"][1:]}


def test_runs_from_before_their_task_was_written_down_go_with_those_on_the_same_data(report, make_run):
    page = report(make_run("a", [0.5, 0.9], seed=1, data__task=None), make_run("b", [0.5, 0.7], seed=2))
    assert [row[1] for row in page.tables["Runs"][1:]] == ["moods", "moods"]
    assert page.tables["final results"][1][1] == "2"


def test_tasks_of_one_name_and_two_metrics_are_two(report, make_run):
    runs = [
        make_run("a", [0.5, 0.9]),
        make_run("b", [0.5, 0.7], server__method="mime", extra={"matthews": 0.4, "matthews_global": 0.3}),
    ]
    begun = make_run("c", None, server__method="fedprox")
    assert [row[1] for row in report(*runs).tables["Runs"][1:]] == ["moods (accuracy)", "moods (matthews)"]
    assert [row[1] for row in report(runs[1], begun).tables["Runs"][1:]] == ["moods", "moods"]


def test_personalised_and_global_accuracy_keep_their_columns(report, make_run):
    runs = [make_run(task, [0.5, 0.7], extra={"accuracy_global": 0.25}, data__task=task) for task in ("one", "two")]
    page = report(*runs)
    head, row = page.tables["final results"]
    assert (row[head.index("accuracy")], row[head.index("accuracy, global")]) == ("0.700", "0.250")
    assert page.tables["final accuracy, personalised"][1][1:] == ["0.700", "0.700", "0.700"]


def test_a_line_goes_up_and_to_the_right_inside_its_band(report, make_run):
    page = report(make_run("a", [0.5, 0.8], seed=1), make_run("b", [0.6, 0.9], seed=2))
    (start, end), (band_start, *_, band_end) = (
        [tuple(map(float, point.split())) for point in re.search(pattern, page.text)[1].split("L")]
        for pattern in (r'class="line" d="M([\d. L]*)"', r'class="band" d="M([\d. L]*)z"')
    )
    assert end[0] > start[0]
    assert end[1] < start[1]  # a picture's y goes down
    assert band_start[1] < start[1] < band_end[1]


def test_several_tasks_have_an_overview_with_means(report, make_run):
    runs = [
        make_run("a1", [0.5, 0.6], data__task="one"),
        make_run("a2", [0.5, 0.8], data__task="two"),
        make_run("b1", [0.5, 0.7], data__task="one", server__method="mime"),
        make_run("b2", [0.5, 0.6], data__task="two", server__method="mime"),
        make_run("c1", [0.5, 0.9], data__task="one", server__method="fedprox"),
    ]
    assert report(*runs).tables["final accuracy, personalised"] == [
        ["configuration", "one", "two", "mean"],
        ["method=fedavg", "0.600", "**0.800**", "**0.700**"],
        ["method=mime", "0.700", "0.600", "0.650"],
        ["method=fedprox", "**0.900**", "–", "–"],
    ]


def test_labels_name_choices_and_leave_out_what_follows_from_them(report, make_run):
    runs = [
        make_run("a", [0.5, 0.6], server__method="fedavg", device__learning_rate=0.1, selection__strategy="all"),
        make_run("b", [0.5, 0.6], server__method="fedpeptao", device__learning_rate=0.2),
        make_run("c", [0.5, 0.6], server__method="fedpeptao", server__variant="released", device__learning_rate=0.3),
    ]
    page = report(*runs)
    assert [row[0] for row in page.tables["final results"][1:]] == [
        "method=fedavg",
        "method=fedpeptao, variant=drift_corrected",
        "method=fedpeptao, variant=released",
    ]
    rates = [
        row[page.tables["Configurations"][0].index("device.learning_rate")] for row in page.tables["Configurations"]
    ]
    assert rates == ["device.learning_rate", "0.1", "0.2", "0.3"]


def test_settings_that_differ_between_tasks_have_a_row_for_each(report, make_run):
    table = report(
        make_run("a1", [0.5], data__task="one", device__learning_rate=0.1),
        make_run("b1", [0.5], data__task="one", device__learning_rate=0.1, server__method="fedprox"),
        make_run("a2", [0.5], data__task="two", device__learning_rate=0.2),
        make_run("b2", [0.5], data__task="two", device__learning_rate=0.1, server__method="fedprox"),
    ).tables["Configurations"]
    rate = table[0].index("learning_rate")
    assert [(row[0], row[rate]) for row in table[1:]] == [
        ("method=fedavg, one", "0.1"),
        ("method=fedavg, two", "0.2"),
        ("method=fedprox", "0.1"),
    ]


def test_how_often_a_run_is_saved_makes_it_no_other_configuration(report, make_run):
    runs = make_run("a", [0.6], rounds=2), make_run("b", [0.8], rounds=2, seed=2, checkpoint__every=7)
    _, *rows = report(*runs).tables["final results"]
    assert [row[1:3] for row in rows] == [["2", "0.700 ± 0.141"]]


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"top_p": 0.5}, {"max_new_tokens": 7}])
def test_how_texts_are_answered_makes_another_configuration_and_how_many_does_not(report, make_run, other):
    """The scores of answers depend on it."""

    def run(name, **changes):
        settings = {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": 64} | changes
        return make_run(name, [0.5], rounds=2, extra=of_texts(8), seed=len(name), evaluate=settings)

    _, *rows = report(run("a"), run("bb", generate=9), run("c", **other)).tables["final results"]
    ((key, value),) = other.items()
    assert [row[1] for row in rows] == ["2", "1"]
    assert rows[1][0] == f"{key}={value}"


def test_the_rounds_that_an_experiment_asks_for_count(report, make_run):
    runs = make_run("a", [0.6, 0.9]), make_run("b", [0.8], rounds=2, seed=2)
    _, *rows = report(*runs, rounds=2).tables["final results"]
    assert [row[1:3] for row in rows] == [["2", "0.700 ± 0.141"]]
    _, *rows = report(*runs, rounds=4).tables["final results"]
    assert [row[1] for row in rows] == ["1 of 2 finished"]


def test_a_real_run(fedhpc, run_config, tmp_path):
    config = run_config(federation__rounds=2, selection__ratio=0.5, evaluate__every=1)
    assert fedhpc("run", config)[0] == 0
    status, said, _ = fedhpc("report", run_dir(config), "--out", tmp_path / "page.html", "--target", "0.01")
    assert status == 0
    assert str(tmp_path / "page.csv") in said
    page = Page(tmp_path / "page.html")
    assert page.faults == []
    assert page.tables["cost to reach accuracy 0.010"][1][1] == "1.0"
    assert re.search(r"<title>layer 0: score [\d.]+", page.text)
    assert page.text.count(", exchanged</title>") == 2  # half of 4 layers
    # 240 training examples on 12 devices, in the three classes of tiny.py
    shares = re.findall(r"<title>device \d+: ([^<]*)</title>", page.text)
    assert len(shares) == 12
    assert sum(int(count) for share in shares for count in re.findall(r"(?:bad|good|mixed) (\d+)", share)) == 240
    assert len(page.tables["accuracy by device"]) == 2


def test_what_is_no_run_directory_is_refused(fedhpc, make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = fedhpc("report", make_run("a", [0.5]), tmp_path / "empty", "--out", tmp_path / "page.html")
    assert status == 2
    assert f"{tmp_path / 'empty'} holds no config.yaml" in err
    assert not (tmp_path / "page.html").exists()


def test_a_configuration_that_cannot_be_read_is_refused(report, make_run):
    folder = make_run("a", [0.5])
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read"):
        report(folder)


@pytest.mark.parametrize(
    ("out", "words"), [("page.csv", "must end in .html"), ("nowhere/page.html", "there is no folder")]
)
def test_a_page_that_cannot_be_written_is_refused(make_run, tmp_path, out, words):
    with pytest.raises(ReportError, match=words):
        write_report([read_run(make_run("a", [0.5]))], tmp_path / out)


def test_a_unit_suits_the_smallest_number_too():
    unit = unit_for("bytes", [27_081_000_000, 12_000_000])
    assert [unit.full_text(value) for value in (27_081_000_000, 12_000_000)] == ["27081 MB", "12 MB"]


def test_an_axis_is_logarithmic_where_lines_end_far_apart(report, make_run):
    far = {"bytes": 100_000_000}
    page = report(make_run("a", [0.5, 0.6]), make_run("b", [0.5, 0.9], extra=far, server__method="mime"))
    assert "bytes moved (MB), logarithmic" in page.text
    assert "rounds, logarithmic" not in page.text


HEAD = "task,metric,statistic,value,source,model.name,server.method"
FIGURES = f"""{HEAD}
moods,accuracy,best personalised,0.75,"Table 2, A",elsewhere/model,fedavg
moods,accuracy,last global,0.5,Table 3,,
moods,accuracy,best global,0.9,Table 4,other-model,
trec,accuracy,best global,0.9,Table 5,,
moods,accuracy_f1,last personalised,0.5,Table 6,,fedavg
"""


@pytest.fixture
def reference(tmp_path):
    def write(text):
        path = tmp_path / "figures.csv"
        path.write_text(text)
        return path

    return write


def test_published_figures_stand_beside_ours(fedhpc, two_methods, reference, tmp_path):
    """Best of fedavg's three runs: 0.7, 0.8, 0.9; so 0.8 with a deviation of 0.1. fedpeptao's last: 0.85, 0.87."""
    status, out, _ = fedhpc("report", *two_methods, "--out", tmp_path / "page.html", "--reference", reference(FIGURES))
    assert status == 0
    assert out.rstrip().endswith(str(tmp_path / "page.published.csv"))
    page = Page(tmp_path / "page.html")
    head, *rows = page.tables["beside published figures"]
    assert head == ["configuration", "task", "metric", "ours", "published", "difference", "source"]
    fedavg, fedpeptao = "method=fedavg", "method=fedpeptao"
    assert rows == [
        [fedavg, "moods", "accuracy, best personalised", "0.800 ± 0.100", "0.750", "+0.050", "Table 2, A"],
        [fedavg, "moods", "accuracy, last global", "0.800 ± 0.100", "0.500", "+0.300", "Table 3"],
        [fedavg, "moods", "mean of accuracy and F1, last personalised", "–", "0.500", "–", "Table 6"],
        [fedpeptao, "moods", "accuracy, last global", "0.860 ± 0.014", "0.500", "+0.360", "Table 3"],
    ]
    assert "2 of figures.csv&#39;s figures are of none of these runs: line 4, 5" in page.text
    assert page.faults == []
    latex = (tmp_path / "page.tex").read_text()
    assert r"\caption{all tasks: beside published figures" in latex
    assert (
        r"method=fedpeptao & moods & accuracy, last global & 0.860 $\pm$ 0.014 & 0.500 & +0.360 & Table 3 \\" in latex
    )
    table = list(csv.DictReader((tmp_path / "page.published.csv").open()))
    assert [(row["configuration"], row["published"]) for row in table] == [
        (fedavg, "0.75"), (fedavg, "0.5"), (fedavg, "0.5"), (fedpeptao, "0.5")
    ]  # fmt: skip
    assert float(table[0]["ours_mean"]) == pytest.approx(0.8)
    assert float(table[0]["difference"]) == pytest.approx(0.05)
    assert table[2]["ours_mean"] == table[2]["difference"] == ""


def test_a_reference_without_figures_is_no_fault(fedhpc, make_run, reference, tmp_path):
    path = reference(f"{HEAD}\n")
    assert fedhpc("report", make_run("a", [0.5]), "--out", tmp_path / "page.html", "--reference", path)[0] == 0
    assert "figures.csv holds no figures" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mnli,accuracy,last global,0.5,T,,", "line 3: task: 'mnli' is none of boolq, cola, moods, mpqa, "),
        ("moods,f2,last global,0.5,T,,", "line 3: metric: 'f2' is none of accuracy, matthews, f1, accuracy_f1, perpl"),
        ("moods,accuracy,last,0.5,T,,", "line 3: statistic: 'last' is none of best personalised, best global, "),
        ("moods,accuracy,last global,85.3,T,,", "line 3: value: '85.3' is no number from 0 to 1"),
        ("moods,accuracy,last global,-0.1,T,,", "line 3: value: '-0.1' is no number from 0 to 1"),
        ("moods,accuracy,last global,nan,T,,", "line 3: value: 'nan' is no number from 0 to 1"),
        ("cola,matthews,last global,-1.1,T,,", "line 3: value: '-1.1' is no number from -1 to 1"),
        ("moods,accuracy,last global,,T,,", "line 3: value: '' is no number from 0 to 1"),
        ("moods,accuracy,last global,0.5,,,", "line 3: source: is required"),
        ("moods,accuracy,last global,0.5,T", "line 3: 5 columns, expected 7: task, metric, "),
        ("cola,matthews,last global,0.3,T,,", "line 3: says the same as line 2"),
    ],
)
def test_faulty_figures_are_refused_before_anything_is_read(fedhpc, make_run, reference, tmp_path, line, message):
    path = reference(f"{HEAD}\ncola,matthews,last global,-0.5,T,,\n{line}\n")
    status, _, err = fedhpc("report", make_run("a", [0.5]), "--out", tmp_path / "page.html", "--reference", path)
    assert status == 2
    assert f"reference: {path}: 1 problem(s)\n  {message}" in err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("task,metric,statistic,value", "line 1: no column source; needed are task, metric, statistic, value, source"),
        (f"{HEAD},tuning.knd", "line 1: column 'tuning.knd': neither one of task, metric, statistic, value, source"),
        (f"{HEAD},tuning.knd", "nor a key of a configuration; did you mean tuning.kind?"),
        (f"{HEAD},tuning", "line 1: column 'tuning': neither one of"),
        (f"{HEAD},task", "line 1: column task stands twice"),
        ('"', "is no CSV file in UTF-8"),
    ],
)
def test_unknown_columns_are_refused(reference, head, message):
    with pytest.raises(ReportError, match=re.escape(message)):
        read_reference(reference(f"{head}\n"))


def test_a_reference_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ReportError, match=f"reference: {tmp_path / 'none.csv'}: cannot be read: No such file"):
        read_reference(tmp_path / "none.csv")
