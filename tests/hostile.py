"""What a stranger may have put into a state file: name -> change of an open server.h5."""

import json

import h5py
import numpy as np

HUGE = 1 << 40


def in_place_of_prompts(make):
    """The prompts' attribute stays, so that only the content is odd."""

    def change(file):
        layers, shape = file["prompts"].attrs["layers"], file["prompts"].shape
        del file["prompts"]
        made = make(file, shape)
        if isinstance(made, h5py.Dataset):
            made.attrs["layers"] = layers

    return change


def dataset(**options):
    return in_place_of_prompts(lambda file, shape: file.create_dataset("prompts", **{"shape": shape} | options))


def link(target):
    def make(file, shape):
        file["prompts"] = target

    return in_place_of_prompts(make)


def attribute(value, name, path="/"):
    return lambda file: file[path].attrs.__setitem__(name, value)


def content(path, value):
    """The attributes stay."""

    def change(file):
        attributes = dict(file[path].attrs)
        del file[path]
        file[path] = value
        file[path].attrs.update(attributes)

    return change


def virtual(file, shape):
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[...] = h5py.VirtualSource("/dev/zero", "prompts", shape)
    return file.create_virtual_dataset("prompts", layout)


def bomb(file, shape):
    return file.create_dataset("prompts", data=np.zeros((1 << 16, *shape[1:]), np.float32), compression="gzip")


def deep(file):
    group = file
    for _ in range(2000):
        group = group.create_group("g")


def wide(file):
    for number in range(1000):
        file[f"wide/{number}"] = np.float32(0)
        file[f"again/{number}"] = file[f"wide/{number}"]


def nan(path):
    def change(file):
        values = file[path][()]
        values.flat[0] = np.nan
        file[path][...] = values

    return change


def record(**changes):
    def change(file):
        values = json.loads(file["history/record"][()].tobytes()) | changes
        del file["history/record"]
        file["history/record"] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


NESTED = "[" * 100_000
NOT_PLAIN = {
    "external link": link(h5py.ExternalLink("/dev/zero", "/prompts")),
    "soft link": link(h5py.SoftLink("/momentum")),
    "soft link to itself": link(h5py.SoftLink("/prompts")),
    "group that holds itself": lambda file: file.__setitem__("history/root", file["/"]),
    "second name": lambda file: file.__setitem__("copy", file["prompts"]),
    "a thousand second names": wide,
    "deep groups": deep,
    "virtual data": in_place_of_prompts(virtual),
    "data in another file": in_place_of_prompts(
        lambda file, shape: file.create_dataset("prompts", shape, np.float32, external=[("/etc/passwd", 0, 4096)])
    ),
    "compressed bomb": in_place_of_prompts(bomb),
    "compressed and never written": dataset(shape=(HUGE,), dtype="f4", compression="gzip"),
    "never written": dataset(shape=(HUGE,), dtype="f4", chunks=(1 << 20,)),
    "never written, contiguous": dataset(shape=(HUGE,), dtype="f4"),
    "one chunk of 3 GB": dataset(dtype="f4", shape=(2, 2, 3, 16), maxshape=(None,) * 4, chunks=(2, 2, 3, 1 << 26)),
    "shuffled": dataset(dtype="f4", shuffle=True, chunks=True),
    "strings": dataset(dtype=h5py.string_dtype()),
    "lists": dataset(dtype=h5py.vlen_dtype(np.float32)),
    "records": dataset(dtype=np.dtype([("a", "f4"), ("b", "i8")])),
    "references": dataset(dtype=h5py.ref_dtype),
    "opaque": dataset(dtype=h5py.opaque_dtype(np.dtype("V8"))),
    "complex numbers": dataset(dtype=np.complex64),
    "no space": in_place_of_prompts(lambda file, shape: file.create_dataset("prompts", data=h5py.Empty("f4"))),
    "a type": in_place_of_prompts(lambda file, shape: file.__setitem__("prompts", np.dtype("f4"))),
    "a thousand texts": attribute(np.array(["x" * 60] * 1000, object), "texts"),
}
"""Refused wherever a state file is opened."""
WRONG = {
    "enumeration": dataset(dtype=h5py.enum_dtype({"a": 0, "b": 1})),
    "other floats": dataset(dtype=np.float64),
    "integers": dataset(dtype=np.int32),
    "one number": dataset(shape=(), dtype="f4"),
    "another shape": dataset(shape=(1, 2, 3, 4), dtype="f4"),
    "a group": in_place_of_prompts(lambda file, shape: file.create_group("prompts")),
    "nothing": in_place_of_prompts(lambda file, shape: None),
    "not finite": nan("prompts"),
    "local parameters not finite": nan("unseen_local_prompts"),
    "no config": lambda file: file.attrs.__delitem__("config"),
    "config is a number": attribute(7, "config"),
    "config is a list": attribute("[1]", "config"),
    "config is nested": attribute(NESTED, "config"),
    "vectors are nested": attribute(NESTED, "vectors"),
    "vectors are not there": attribute('["second_moment"]', "vectors"),
    "scalars are a list": attribute("[1]", "scalars"),
    "scalars are words": attribute('{"server_learning_rate": "much"}', "scalars"),
    "round is a word": attribute("three", "round"),
    "round is infinite": attribute(np.inf, "round"),
    "round is a list": attribute([1, 2], "round"),
    "negative layer": content("selection/layers", np.array([-1, 0])),
    "layer beyond the last": content("selection/layers", np.array([0, 4])),
    "layer twice": content("selection/layers", np.array([1, 1])),
    "layers that fall": content("selection/layers", np.array([1, 0])),
    "too many layers": content("selection/layers", np.arange(4)),
    "layers are floats": content("selection/layers", np.array([0.0, 1.0])),
    "scores of other layers": content("selection/scores", np.zeros(2)),
    "norms are a table": content("history/update_norm", np.zeros((2, 2))),
    "record is no JSON": content("history/record", np.zeros(7, np.uint8)),
    "record is nested": content("history/record", np.frombuffer(NESTED.encode(), np.uint8)),
    "record is a list": content("history/record", np.frombuffer(b"[1]", np.uint8)),
    "record has words": record(loss="much"),
    "record has no seconds": record(seconds=[]),
}
"""Refused where the state is used; `inspect` shows what there is."""
