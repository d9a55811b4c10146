"""The house: imports only downward."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedhpc"
FLOORS = [
    {"__init__", "errors", "files", "seeding", "stopping", "background", "arguments", "yaml_files"},
    {"config", "jobenv", "quick_start", "weights", "last_layer", "word_head", "bounded", "plain_hdf5", "console"},
    {"lock", "tables", "config_file", "notices", "pretrained", "identity", "report"},
    {"data", "tasks", "partition", "metrics", "updates"},
    {"methods", "messages", "answers", "attention", "exact_sum", "overlay", "tokens", "limits"},
    {"models", "encoding", "packing", "federation", "texts"},
    {"structure", "simulation", "preparing"},
    {"tuning", "selection"},
    {"step_rules", "curriculum", "sensitivity"},
    {"local_update", "evaluate", "spectrum"},
    {"measuring", "state_file", "rounds"},
    {"exchange", "checkpoint_files"},
    {"checkpoint", "trace", "soundness"},
    {"device", "control"},
    {"job"},
    {"rehearsal"},
    {"plan_memory"},
    {"saving", "plan", "inspection", "trained", "pages"},
    {"server", "export", "predict"},
    {"sweep", "role"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedhpc":
            parts = node.module.split(".")
            yield from (
                [parts[1]] if len(parts) > 1 else [a.name for a in node.names if (PACKAGE / f"{a.name}.py").exists()]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("fedhpc."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no floor"
    upward = {other for other in imported(path) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not upward, f"{path} imports upward: {upward}"


def test_only_the_exchange_imports_mpi():
    users = {path.parent.name for path in PACKAGE.rglob("*.py") if "mpi4py import" in path.read_text()}
    assert users == {"exchange"}


def test_methods_need_no_model_file_or_mpi():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert set(imported(path)) <= {"config", "updates", "methods"}
        assert "import torch" not in path.read_text()
