"""`fedhpc keys`: what it says is what a configuration takes, and what the documentation says."""

import shutil

import pytest
import yaml
from tiny import ROOT

from fedhpc.commands.cli import main
from fedhpc.commands.keys import MARKER, REQUIRED, keys_of, section_names, tables, write_tables
from fedhpc.config import Config, every_default, flatten, section_of
from fedhpc.config.file import known_keys
from fedhpc.registry import SECTIONS

REFERENCE = ROOT / "docs/configuration.md"
MINIMAL = {"run_dir": "r", "model": {"name": "m"}, "data": {"path": "d"}}
KEYS = [key for section in section_names() for key in keys_of(section)]


def test_every_key_is_there_once_for_each_part():
    leaves = {key for key in known_keys() if key not in section_names()}
    assert {key.name for key in KEYS} == leaves
    pairs = [(key.name, part) for key in KEYS for part in key.parts or ("",)]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.name}-{'-'.join(key.parts)}")
def test_a_default_is_what_a_configuration_has_without_the_key(key):
    if key.default == REQUIRED:
        assert key.name in flatten(MINIMAL)
        return
    section, _, leaf = key.name.rpartition(".")
    registry = next((registry for registry in SECTIONS if registry.section == section), None)
    found = flatten(Config.model_validate(MINIMAL).model_dump()).get(key.name)
    if registry is not None and key.parts:
        found = getattr(section_of(registry, **{registry.key: key.parts[0]}), leaf)
    assert yaml.safe_load(key.default) == found


def test_every_key_says_what_it_is():
    for key in [*KEYS, *keys_of("trackers")]:
        assert len(key.meaning) > 5, key
        assert key.kind, key
        assert key.meaning[0].isupper() or key.meaning.startswith(("`", "eta", "beta", "mu", "sigma", "alpha")), key


def test_the_reference_has_these_tables(tmp_path):
    page = shutil.copy(REFERENCE, tmp_path / "configuration.md")
    assert write_tables(page) == REFERENCE.read_text(), "run make keys"
    assert [found[1] for found in MARKER.finditer(REFERENCE.read_text())] != []
    assert {found[1] for found in MARKER.finditer(REFERENCE.read_text())} == set(tables())


def test_a_plugin_has_its_keys_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "keyed.py").write_text(
        "import fedhpc\n@fedhpc.register_method('keyed')\nclass Keyed(fedhpc.methods.FedAvg):\n"
        "    class Config(fedhpc.MethodConfig):\n        rho: float = 0.25\n"
        '        """Share of the previous step that is taken again."""\n'
    )
    monkeypatch.chdir(tmp_path)
    before = {registry: dict(registry._parts) for registry in SECTIONS}
    try:
        assert main(["keys", "server", "--plugins", "keyed"]) == 0
    finally:
        for registry, parts in before.items():
            registry._parts = parts
    words = " ".join(capsys.readouterr().out.split())
    assert "server.rho [keyed] number; default: 0.25 Share of the previous step that is taken again." in words


def test_an_unknown_section_is_refused_with_those_that_there_are(capsys):
    assert main(["keys", "servr"]) == 2
    assert "'servr' is no section; there are top level, model, data" in capsys.readouterr().err


def test_defaults_of_all_parts_are_known():
    assert every_default()["server.tau"] == 1e-3
