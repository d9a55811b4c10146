"""A hundred and more odd command lines and files: each is refused with one message and 2, or means what it says."""

import json
import os
import typing
from collections import Counter

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from fedhpc.config import Config, flatten
from fedhpc.config.file import known_keys, load_config
from fedhpc.config.sections import Section
from fedhpc.errors import EXIT_USER_ERROR
from fedhpc.registry import SECTIONS

SEED = 20261201
TRIALS = 80
FILES = ("model.name", "data.path", "run_dir", "tuning.sources")
NUMBERS = (
    *("0", "-1", "1", "2", "3", "0.5", "1e3", "1e-300", "1e308", "1e400", ".inf", "-.inf", ".nan", "nan", "0042"),
    *("0x10", "1_0", "9" * 30, "9" * 5000, "-0", "1.", "2.5", "9223372036854775807", "65537", "١", "½", "1:30", "1,5"),
)
ODDITIES = (
    *("true", "yes", "null", "~", "", "[]", "[1]", "[0, 1]", "[-1]", "[[1]]", "{}", "{a: 1}", "{x", "]", "'a", "&a b"),
    *("*a", "<<", "- a", "? b", "!!int 3", "!!python/name:os.system", "|", ">", "a: b", "3 # x", "#", "a\tb", "\u2028"),
    *("auto", "all", "explicit", "\U0001d518", "\udcff", "x\0y", "x\ny", "%s", "{0}", "$HOME", "[" * 500, "a" * 5000),
)
ENDED, REFUSED = "ended", "refused"


def some(rng, options):
    return options[int(rng.integers(len(options)))]


def valid(key):
    """Values that a key takes by its type."""
    section, _, leaf = key.rpartition(".")
    registry = next((registry for registry in SECTIONS if registry.section == section), None)
    if registry is None:
        field = Config
        for part in key.split("."):
            field = (field if isinstance(field, type) else field.annotation).model_fields[part]
    elif leaf == registry.key:
        return tuple(registry)
    else:
        fields = (part.Config.model_fields for _, part in registry.items())
        field = next(each[leaf] for each in fields if leaf in each)
    annotation, choices = field.annotation, []

    def look(kind):
        if typing.get_origin(kind) is typing.Literal:
            choices.extend(typing.get_args(kind))
        for part in typing.get_args(kind):
            look(part)

    look(annotation)
    if annotation is bool:
        return ("true", "false")
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return ("{}", "null")
    return (*map(str, choices), *(("1", "2", "4", "12") if "int" in str(annotation) else ("0.25", "0.5", "0.9")))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Names of files that are none, or none of the kind that is wanted."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nested").write_text("[" * 100_000)
    names = ["file", "loop", "nested", "nowhere", ".", "x" * 300, "é/" * 2000, "file/inside"]
    return [str(folder / name) for name in names] + [
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "",
        " ",
        "..",
        "~nobody/x",
    ]


def override(rng, places):
    key = (
        some(rng, known_keys())
        if rng.random() < 0.95
        else some(rng, ("", ".", "nope", "seed.x", "model.", "device.epoch"))
    )
    options = (NUMBERS, ODDITIES, places)[int(rng.choice(3, p=(0.45, 0.4, 0.15)))]
    if key in FILES:
        options = places
    elif key in known_keys() and rng.random() < 0.75:
        options = valid(key)
    return f"{key}={some(rng, options)}"


def config_file(rng, world, folder, places):
    """A configuration as a file, sometimes not of that form."""
    values = yaml.safe_load(world.read_text())
    for text in (override(rng, places) for _ in range(rng.integers(0, 3))):
        key, _, value = text.partition("=")
        section, _, leaf = key.rpartition(".")
        target = values.setdefault(section, {}) if section and rng.random() < 0.8 else values
        if isinstance(target, dict):
            target[leaf] = value
    text = yaml.safe_dump(values)
    if rng.random() < 0.3:
        odd = (
            "",
            "- a",
            "a: {",
            text + text,
            f"base: {some(rng, places)!r}\n{text}",
            text.replace(":", " "),
            "\ufeff" + text,
        )
        text = some(rng, odd)
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path


def experiment_file(rng, world, folder, places):
    grid = {
        some(rng, (*known_keys(), "cell", "", "a/b")): some(
            rng, ([1, 2], [], {"x": {}, "y": {"seed": 3}}, "auto", [None])
        )
    }
    values = {"base": str(world), "out": str(folder / "out"), "grid": grid | {"seed": [1, "x"][: rng.integers(1, 3)]}}
    values |= {some(rng, ("set", "exclude", "launch", "target", "base", "out", "budget_bytes")): some(rng, (
        {"seed": 3}, {"nope": 1}, [], "", some(rng, places), -1, None, [{"seed": 1}], {"base": 1}
    ))} if rng.random() < 0.7 else {}  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(values))
    return path


def command_line(rng, world, folder, places):
    kind = some(rng, ("plan", "plan", "plan", "sweep", "other"))
    sets = [part for _ in range(rng.integers(0, 4)) for part in ("--set", override(rng, places))]
    if kind == "plan":
        config = some(rng, (world, world, config_file(rng, world, folder, places), some(rng, places)))
        ranks = some(rng, ("1", "2", "17", "0", "-1", "x", "²", "1e3", "99999"))
        return ["plan", str(config), "--ranks", ranks, *sets]
    if kind == "sweep":
        return ["sweep", str(experiment_file(rng, world, folder, places)), "--dry-run", *sets[:2]]
    place, other = some(rng, places), some(rng, places)
    return some(rng, (
        ["inspect", place],
        ["report", place, "--out", other],
        ["export", place, "--out", str(folder / "new"), "--device", some(rng, NUMBERS)],
        ["predict", place, "--text", "a"],
        ["predict", place, "--file", other, "--out", str(folder / "new")],
        ["run", place, *sets],
        ["sweep", place, *sets],
        [place],
        [],
    ))  # fmt: skip


def outcome(run, arguments):
    """In words: how a command ended, and whether as it should."""
    try:
        status, _, err = run(*arguments)
    except SystemExit as end:  # argparse
        return ENDED if end.code == 0 else REFUSED if end.code == EXIT_USER_ERROR else f"exit {end.code}"
    if "Traceback" in err or (status == EXIT_USER_ERROR) != (err.count("error:") == 1):
        return f"{status}: {err[-1500:]}"
    return {0: ENDED, EXIT_USER_ERROR: REFUSED}.get(status, f"exit status {status}: {err[-1500:]}")


def test_odd_command_lines_are_refused_with_one_message_or_do_what_they_say(
    world, places, fedhpc, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a model's name that is no folder is one of the hub
    rng, outcomes, wrong = np.random.default_rng(SEED), Counter(), []
    for trial in range(int(os.environ.get("FEDHPC_FUZZ_TRIALS", TRIALS))):
        folder = tmp_path / str(trial)
        folder.mkdir()
        arguments = command_line(rng, world, folder, places)
        found = outcome(fedhpc, arguments)
        outcomes[(arguments or ["nothing"])[0][:10], found if found in (ENDED, REFUSED) else "wrong"] += 1
        if found not in (ENDED, REFUSED):
            wrong.append(f"{[word[:200] for word in arguments]}: {found}")
        elif arguments[:1] == ["plan"] and found == ENDED:
            config = load_config(arguments[1], [text for text in arguments[4:] if text != "--set"])
            (folder / "resolved.yaml").write_text(config.to_yaml())
            assert flatten(load_config(folder / "resolved.yaml").model_dump()) == flatten(config.model_dump())
    assert not wrong, "\n".join([f"{len(wrong)}:", *wrong[:10]])
    assert outcomes["plan", ENDED] > 5
    assert sum(count for (_, found), count in outcomes.items() if found == REFUSED) > 60
