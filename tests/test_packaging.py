"""The recipes of packaging/ name what setup.py does."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import fedhpc

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "packaging"
IN_CONDA = {"torch": "pytorch"}
DEFAULTS = {"EXTRAS": "openmpi,data", "INDEX": "https://download.pytorch.org/whl/cpu"}


@pytest.fixture(scope="module")
def declared():
    """setup.py's arguments that are literals."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = tree.body[-1].value
    found = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = found.pop("extras_require")
    found |= {key.value: value for key, value in zip(extras.keys, extras.values, strict=True)}
    return {name: ast.literal_eval(found[name]) for name in ("install_requires", "python_requires", "data", "openmpi")}


def versions(requirements):
    """Name, in small letters -> the oldest version."""
    return {name.lower(): version for name, version in (part.split(">=") for part in requirements)}


def test_spack(declared):
    text = (FOLDER / "spack/package.py").read_text()
    needed = versions([*declared["install_requires"], *declared["data"]])
    assert dict(re.findall(r'depends_on\("py-(\w+)@([\d.]+):"', text)) == needed
    assert re.findall(r'depends_on\("python@([\d.]+):"', text) == [declared["python_requires"].removeprefix(">=")]
    assert re.findall(r'version\("(.+?)"', text) == [fedhpc.__version__]
    ast.parse(text)


def test_conda(declared):
    recipe = yaml.safe_load((FOLDER / "conda/recipe.yaml").read_text())
    needed = versions([*declared["install_requires"], *declared["data"], *declared["openmpi"]])
    needed = {IN_CONDA.get(name, name): version for name, version in needed.items()}
    run = versions(line.replace(" ", "") for line in recipe["requirements"]["run"])
    assert run == {"python": declared["python_requires"].removeprefix(">="), **needed}
    assert recipe["context"]["version"] == fedhpc.__version__


def test_images():
    docker, apptainer = ((FOLDER / name).read_text() for name in ("Dockerfile", "fedhpc.def"))
    for name, value in DEFAULTS.items():
        assert f"\nARG {name}={value}\n" in docker
        assert f"\n    {name}={value}\n" in apptainer
    (base,) = re.findall(r"BASE=(.*)", apptainer)
    assert f"\nARG BASE=docker.io/library/{base}\n" in docker
    copied = " ".join(re.findall(r"^COPY (?!--|dist)(.+) \S+$", docker, re.MULTILINE)).split()
    copied += re.findall(r"^    ([^{\s]\S*) /source/$", apptainer, re.MULTILINE)
    assert len(copied) > 6
    assert not [path for path in copied if not (ROOT / path).exists()]
    assert re.findall(r"^USER (.+)", docker, re.MULTILINE) == ["1000"]
