"""The house: imports only downward, from folder to folder and within each folder without circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedhpc"
FOLDERS = [
    *("root", "config", "job", "data", "methods", "federation", "attack", "privacy", "model", "tuning", "selection"),
    *("evaluate", "exchange", "checkpoint", "device", "server", "commands", "doors"),
]
"""From the ground up: a folder imports from itself and from those before it."""
DOORS = ("fedhpc.__main__", "fedhpc.api", "fedhpc.testing")
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def folder_of(module):
    """The folder of fedhpc/ that a module is in, `root` for those at the top, `doors` for the public ones."""
    if module in DOORS:
        return "doors"
    path = MODULES[module].relative_to(PACKAGE)
    return path.parts[0] if len(path.parts) > 1 else "root"


def imported(module):
    """The modules of fedhpc that a module imports, anywhere in it; the public names are loaded when they are used."""
    if module == "fedhpc":
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names if name.startswith("fedhpc"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    above = FOLDERS[FOLDERS.index(folder_of(module)) + 1 :]
    upward = {other for other in imported(module) if folder_of(other) in above}
    assert not upward


def test_no_circles():
    TopologicalSorter({module: set(imported(module)) for module in MODULES}).prepare()


def test_server_and_devices_do_not_know_each_other():
    for module in MODULES:
        if folder_of(module) == "server":
            assert not {other for other in imported(module) if folder_of(other) == "device"}


def test_one_place_imports_mpi():
    users = {module for module, path in MODULES.items() if "import mpi4py" in path.read_text()}
    assert users == {module for module, path in MODULES.items() if "mpi4py import" in path.read_text()}
    assert users == {"fedhpc.exchange.loading"}


def test_methods_need_no_model_file_or_mpi():
    for module, path in MODULES.items():
        if folder_of(module) == "methods":
            assert {folder_of(other) for other in imported(module)} <= {"root", "config", "methods"}
            assert "import torch" not in path.read_text()
