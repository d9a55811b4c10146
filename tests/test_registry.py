"""Parts are known by their registration alone: nothing else names one, and a new one is one file."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

import fedhpc
from fedhpc.config import Config
from fedhpc.errors import ConfigError
from fedhpc.methods import FedAvg
from fedhpc.methods.fedpeptao import FedPepTAO
from fedhpc.registry import ENCODINGS, METHODS, TUNINGS, Registry, load_plugins, source_sha256

PACKAGE = ROOT / "fedhpc"
TWIN = '''"""FedAvg's twin."""

from fedhpc.methods.fedavg import FedAvg
from fedhpc.registry import METHODS


@METHODS.register("twin")
class Twin(FedAvg):
    """P^{t+1} = sum_i w_i P_i."""
'''


OF_TEXTS = ("generations.py", "answers.py", "generation_readme.py", "layout.py")
"""Of texts to be generated, which have prompts of another kind."""


def homes():
    """Name of a method, a variant or a tuning -> the file that registers it."""
    found = {name: part.__module__ for registry in (METHODS, TUNINGS) for name, part in registry.items()}
    found |= dict.fromkeys(FedPepTAO.VARIANTS, FedPepTAO.__module__)
    return {name: ROOT / f"{module.replace('.', '/')}.py" for name, module in found.items()}


def test_no_other_file_names_a_method_or_tuning_by_its_kind():
    named = []
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "registry.py" or path.parent.name == "data" or path.name in OF_TEXTS:
            continue  # it has the defaults
        texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        named += [(path.name, name) for name, home in homes().items() if name in texts and path != home]
    assert named == []


def test_the_twin_of_fedavg_is_one_file(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fedhpc", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedhpc/methods/twin.py").write_text(TWIN)
    script = (
        "import fedhpc; c = fedhpc.load_config('c.yaml'); print(c.parts['server'].__name__, c.server.method);"
        "fedhpc.testing.check_method(c.parts['server'])"
    )
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"run_dir": "r", "model": {"name": "m"}, "data": {"path": "d"}, "server": {"method": "twin"}})
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "Twin twin\n", done.stderr
    page = (ROOT / "docs/own-method.md").read_text()
    assert TWIN in page


def test_a_name_is_taken_once_and_a_class_may_be_defined_again():
    registry = Registry("thing", "Method")
    registry.register("a")(FedAvg)
    assert registry.register("a")(FedAvg) is FedAvg
    with pytest.raises(ConfigError, match=r"thing 'a' is registered twice: by .*FedAvg and .*FedPepTAO"):
        registry.register("a")(FedPepTAO)


class NoPart:
    pass


class Unfinished(fedhpc.Method):
    def init(self, params):
        return params


class PlainConfig(FedAvg):
    class Config:
        rho = 1


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (NoPart, r"server method 'x': .*NoPart must derive from fedhpc.Method"),
        (Unfinished, r"server method 'x': .*Unfinished lacks step"),
        (PlainConfig, r"server method 'x': .*PlainConfig: its Config must derive from that of fedhpc.Method"),
    ],
)
def test_a_class_that_is_no_such_part_is_refused(part, words):
    with pytest.raises(ConfigError, match=words):
        METHODS.register("x")(part)
    assert "x" not in METHODS


@pytest.mark.parametrize("name", ["loss", "accuracy", "perplexity", "round"])
def test_a_metric_of_generated_text_does_not_take_the_place_of_another_number(name):
    class Mine(fedhpc.GenerationMetric):
        title = "mine"

        def score(self, answers, references):
            return 0.5

    with pytest.raises(ConfigError, match=f"metric of generated text '{name}': .*Mine needs another name"):
        fedhpc.register_generation_metric(name)(Mine)


def test_a_decorator_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="a server method is registered under a name"):
        METHODS.register(FedAvg)


@pytest.mark.parametrize("module", ["mine.py", "./mine", "/somewhere/mine.py"])
def test_a_plugin_is_a_module_not_a_file(module):
    with pytest.raises(ConfigError, match=r"is a file; give the module's name, mine, and start where it lies"):
        load_plugins([module])


def test_the_identity_has_the_source_of_strangers_alone(tmp_path, monkeypatch):
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("from house.room import Room\n")
    (package / "room.py").write_text("import fedhpc\n\n\nclass Room(fedhpc.methods.FedAvg):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    house = importlib.import_module("house")
    found = source_sha256([FedAvg, house.Room], ["house"])
    assert found.keys() == {"house", "house.room"}
    (package / "room.py").write_text("# changed\n")
    changed = source_sha256([house.Room], ["house"])
    assert all(found[name] != changed[name] for name in found)
    assert source_sha256([FedAvg], []) == {}


def test_no_source_in_the_identity_of_a_run_without_plugins():
    config = Config.model_validate({"run_dir": "r", "model": {"name": "m"}, "data": {"path": "d"}})
    assert not [key for key in config.identity() if "source of" in key]


def test_at_most_twelve_files_beside_the_folders():
    built = ".so"  # by the installation
    assert len([path for path in PACKAGE.iterdir() if path.is_file() and path.suffix != built]) <= 12
    assert Path(PACKAGE / "py.typed").exists()


def test_the_order_of_parts_does_not_depend_on_what_was_imported_first():
    program = "import fedhpc.exchange.encodings.topk; from fedhpc.registry import ENCODINGS; print(*ENCODINGS)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(ENCODINGS) == ["dense", "topk"]
