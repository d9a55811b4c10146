"""data_prep/prepare.py and data_prep/partition.py, by their former names."""

import sys

import pytest
from tiny import load_script


@pytest.mark.parametrize("name", ["prepare", "partition"])
def test_an_old_name_does_what_the_command_does(world, tmp_path, fedhpc, capfd, monkeypatch, name):
    def old(*arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return load_script(name).main(), *capfd.readouterr()

    folder = world.parent
    source = ["--source", folder / "source", "--model", folder / "backbone", "--out", tmp_path / "out"]
    right, wrong = {
        "prepare": (["--task", folder / "source/task.yaml", *source], ["--task", "nothing", *source]),
        "partition": (["--data", folder / "prepared", "--num-devices", 3], ["--data", tmp_path / "nowhere"]),
    }[name]
    done = fedhpc(name, *right)
    assert done[0] == 0
    assert old(*right) == done
    status, out, err = fedhpc(name, *wrong)
    assert (status, out) == (2, "")
    assert old(*wrong) == (2, "", err.removeprefix("fedhpc: "))
