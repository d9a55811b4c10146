"""What README.md and docs/ tell a user to type is what fedhpc takes."""

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from fedhpc.commands.arguments import make_parser
from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.config.file import load_config
from fedhpc.data.task_files import load_task

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = {
    *(
        "apptainer",
        "cat",
        "cp",
        "docker",
        "export",
        "jupyter",
        "ln",
        "lm_eval",
        "mkdir",
        "mlflow",
        "pip",
        "rattler-build",
        "sbatch",
    ),
    *("tensorboard", "trackio", "wandb"),
}


def blocks(page, *languages):
    """The fenced blocks of these languages, also within a list."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [
        "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        for indent, language, text in found
        if language in languages
    ]


def examples(*languages, pages=PAGES):
    """Each block with the page it is on as its name."""
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in pages
        for number, text in enumerate(blocks(page, *languages))
    ]


def command_lines():
    for page in PAGES:
        for text in blocks(page, "sh"):
            for line in text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}")


def parse(arguments):
    """What the command line makes of them; a SystemExit if they are at fault."""
    return make_parser(defaultdict(lambda: print)).parse_args(arguments)


@pytest.mark.parametrize("words", [*command_lines()])
def test_a_command_can_be_typed_as_it_stands(words):
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    fedhpc_at = [place for place, word in enumerate(words) if word.split("/")[-1] == "fedhpc"]
    scripts = [word for word in words[1:] if word.endswith((".py", ".slurm"))]
    if words[0] == "eval":
        parse(re.search(r"\$\(fedhpc (.*)\)", words[1])[1].split())
    elif fedhpc_at:
        parse(words[fedhpc_at[0] + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif scripts:
        shown = "".join(page.read_text() for page in PAGES)
        assert (ROOT / scripts[0]).exists() or f"# {scripts[0]}\n" in shown or f"`{scripts[0]}`" in shown
    else:
        assert words[0] in OTHER_PROGRAMS or words == [".", ".venv/bin/activate"]


@pytest.mark.parametrize("arguments", [["run"], ["run", "x.yaml", "--resmue", "never"], ["train", "x.yaml"]])
def test_a_command_that_cannot_be_typed_is_found(arguments):
    with pytest.raises(SystemExit):
        parse(arguments)


@pytest.mark.parametrize("text", examples("yaml"))
def test_a_yaml_file_is_one_that_fedhpc_reads(text, tmp_path):
    path, content = tmp_path / "experiments/example.yaml", yaml.safe_load(text)
    path.parent.mkdir()
    path.write_text(text)
    if "grid" in content and "base" in content:
        (tmp_path / "jobs").symlink_to(ROOT / "jobs")
        (path.parent / "reviews.yaml").write_text(blocks(README, "yaml")[0])
        assert load_experiment(path).cells
    elif "grid" in content:
        assert set(content) <= {"needs", "grid"}  # a part of an experiment
    elif "columns" in content:
        assert load_task(path).name == content["task"]
    elif not {"plugins", "dataset_path"} & set(content):  # else see below, and commands/test_lm_eval.py
        load_config(path)


@pytest.mark.parametrize("text", examples("python"))
def test_python_is_python(text):
    compile(text, "example", "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if "@fedhpc.register_" in page.read_text()], ids=str)
def test_a_plug_in_registers_and_passes_its_check(page, tmp_path):
    texts = blocks(page, "python")
    for number, text in enumerate(texts):
        name = re.match(r"# (\w+\.py)\n", text)
        (tmp_path / (name[1] if name else f"test_{number}.py")).write_text(text)
    programs = []
    for text in blocks(page, "yaml"):
        if "plugins:" in text:
            (tmp_path / "job.yaml").write_text(text)
            programs.append("import fedhpc; fedhpc.load_config('job.yaml')")
    for file in sorted(tmp_path.glob("*.py")):
        tests = f"runpy.run_path('{file.name}').items() if name.startswith('test_')"
        programs.append(f"import runpy; [test() for name, test in {tests}]")
    for program in programs:
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 140
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"\(docs/([\w-]+\.md)", text))


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()))
def test_a_link_of_readme_leads_somewhere(link):
    file, _, place = link.partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert not place or place in map(anchor, headings)


def test_numbers_of_readme_are_those_of_the_results():
    _, _, results = README.read_text().partition("## Results\n")
    numbers = re.findall(r"\d[\d,]*\.\d+", results.partition("\n## ")[0])
    assert len(numbers) > 10
    assert [number for number in numbers if number not in (ROOT / "docs/results.md").read_text()] == []
