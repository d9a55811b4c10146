"""The notebook runs from its first cell to its last.

Its code is run as a kernel runs it, cell by cell in one new process whose classes have no file. A kernel itself, of
nbclient and ipykernel, would bring 31 packages, a debugger and a web server among them.
"""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT, load_script

import fedhpc

NOTEBOOK = ROOT / "docs/first-steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
KERNEL = """
import json, linecache, sys
for number, text in enumerate(json.load(sys.stdin)):
    name = f"cell {number}"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"))
print(len(axes.lines), "lines in the plot")
"""


def text_of(kind):
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


@pytest.fixture
def checkout(tmp_path):
    """What the notebook needs of one, with a demo that was made in fewer steps."""
    demo = load_script("make_demo")
    few = {"train_examples": 150, "dev_examples": 30, "pretraining_texts": 600, "pretraining_steps": 2, "batch_size": 8}
    out = tmp_path / "runs/demo/backbone"
    demo.make_demo(out, demo.DemoSettings(**few))
    (out / demo.MARKER).write_text(demo.marker_text(demo.DemoSettings()))
    for folder in ("data_prep", "jobs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_cells_run_in_order(checkout):
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=json.dumps(text_of("code")),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=checkout / "docs",
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "2 lines in the plot"
    assert [line for line in lines if line.startswith(("negative", "neutral", "positive"))]
    for name in ("fedavg", "mine"):
        assert len(fedhpc.RunResult(checkout / "runs/first-steps" / name).metrics) == 8


def test_its_form():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_its_script_has_what_the_cells_have():
    """So that it goes on in the folder of the notebook's run."""
    (script,) = re.findall(r"```python\n(# study\.py\n.*?)```", text_of("markdown")[-1], re.DOTALL)
    cells = [ast.dump(node) for text in text_of("code") for node in ast.parse(text).body]
    nodes = [ast.dump(node) for node in ast.parse(script).body]
    assert [ast.unparse(ast.parse(script).body[place]) for place, node in enumerate(nodes) if node not in cells] == [
        "result = fedhpc.run(config, handle_signals=True)",
        "if result is not None:\n    print(result.finished, result.metrics[-1]['accuracy'], result.sha256)",
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w.-]+\.md)(?:#[\w-]+)?\)", "".join(text_of("markdown"))))
def test_a_link_leads_somewhere(link):
    assert (NOTEBOOK.parent / link).exists()
