"""`fedhpc partition` of texts to be generated."""

import pytest
from texts import prepare_texts


def rows(path):
    """The lines of a table, by their first cell."""
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    return header, {line[0]: dict(zip(header, line, strict=True)) for line in lines}


@pytest.fixture
def preview(fedhpc, prepared_texts, tmp_path):
    def run(*arguments, data=prepared_texts):
        status, out, err = fedhpc("partition", "--data", data, "--table", tmp_path / "table.tsv", *arguments)
        assert status == 0, err
        return out, *rows(tmp_path / "table.tsv")

    return run


def test_natural_devices_have_their_names_and_categories(preview):
    out, header, devices = preview("--partition", "column", "--num-devices", 3)
    assert sorted(header) == sorted(["device", "name", "examples", "bad", "good", "mixed", "validation"])
    assert {(line["name"], line["examples"], line["validation"]) for line in devices.values()} == {
        ("bob", "40", "4"),
        ("cid", "25", "4"),
        ("dot", "60", "4"),
    }
    assert "11 of 136 training examples and 12 of 24 validation examples belong to no device" in out


def test_topics_are_shown_by_a_text_of_each(preview, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "topics.svg"
    arguments = ["--set", "federation.clusters=3", "--set", "federation.held_out=0.5", "--out", picture]
    out, header, devices = preview("--partition", "cluster", "--num-devices", 4, *arguments)
    assert header == ["device", "held out", "examples", "topic 0", "topic 1", "topic 2", "validation"]
    assert [line["held out"] for line in devices.values()].count("yes") == 2
    topics = [line for line in out.splitlines() if line.startswith("topic")]
    assert len(topics) == 3
    assert all("such as: the place was" in line for line in topics)
    assert "topic 2" in picture.read_text() or picture.stat().st_size > 1000


def test_texts_without_categories_are_counted_alone(preview, fedhpc, world, tmp_path):
    data = prepare_texts(tmp_path, world.parent / "backbone", device=None, category=None)
    out, header, devices = preview("--partition", "iid", "--num-devices", 4, data=data)
    assert header == ["device", "examples", "validation"]
    assert {line["examples"] for line in devices.values()} == {"34"}
    assert "label skew" not in out
    status, _, err = fedhpc("partition", "--data", data, "--num-devices", 4)
    assert status == 2
    assert "`category:` in the task file" in err
