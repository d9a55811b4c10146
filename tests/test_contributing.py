"""What CONTRIBUTING.md and CITATION.cff say is so."""

import re

import yaml
from test_layers import FOLDERS, PACKAGE

import fedhpc

ROOT = PACKAGE.parent


def test_the_picture_has_every_folder_from_the_top_to_the_ground():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\w+) +[│▼]  \S", text, re.MULTILINE) == FOLDERS[::-1]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*FOLDERS} - {"root", "doors"}


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:fedhpc|tests|jobs|data_prep|experiments)/[\w./*]*)`", text)
    assert len(names) > 8
    assert not [name for name in names if not list(ROOT.glob(name.rstrip("/")))]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", fedhpc.__version__)
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2310.15080"
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Che", "Liu", "Zhou", "Ren", "Zhou", "Sheng", "Dai", "Dou")
    ]
