"""The compiled loop and NumPy's: the same bits."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fedhpc.methods import adding

SOURCE = Path(adding.__file__).with_suffix(".c")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The loop as setup.py has it compiled, whether or not it was when fedhpc was installed."""
    return build(SOURCE, tmp_path_factory.mktemp("adding"))


def build(source, folder):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    library = folder / "adding.so"
    command = ["cc", "-shared", "-fPIC", "-O3", "-march=native", "-ffp-contract=off", source, "-o", library]
    subprocess.run(command, check=True)
    return str(library)


@pytest.mark.parametrize("with_total", [False, True])
@pytest.mark.parametrize("size", [0, 1, 7, 4096, 70_001])
def test_the_compiled_loop_gives_the_bits_of_numpy(built, size, with_total):
    rng = np.random.default_rng(size)
    weights = rng.random(5) / 3
    records = rng.standard_normal((5, 16 + size), np.float32) * np.float32(1e-3)
    records[0, 16:19] = (np.inf, -0.0, 1e-42)[:size]
    add = adding.load(built)
    assert add
    found, expected = (
        adding._add_up(each, records[:, 16:], weights, size, with_total=with_total) for each in (add, None)
    )
    assert found.mean.tobytes() == expected.mean.tobytes()
    assert (found.total is None) == (not with_total)
    assert not with_total or found.total.tobytes() == expected.total.tobytes()


@pytest.mark.parametrize(
    "make", [lambda v: v.astype(np.float64), lambda v: np.repeat(v, 2)[::2], lambda v: np.float32(0.5)]
)
def test_a_term_that_c_cannot_read_is_numpys(built, make):
    term = make(np.linspace(0.1, 1, 9, dtype=np.float32))
    (found, expected) = (
        adding._add_up(each, [term], np.array([0.3]), 9, with_total=False) for each in (adding.load(built), None)
    )
    assert found.mean.tobytes() == expected.mean.tobytes()


def test_a_library_with_other_bits_is_not_used(tmp_path):
    loop = SOURCE.read_text()
    other = tmp_path / "other.c"
    other.write_text(loop.replace("mean[i] += weight * wide", "mean[i] = __builtin_fma(weight, wide, mean[i])"))
    assert other.read_text() != loop
    assert adding.load(build(other, tmp_path)) is None
    assert adding.load(str(tmp_path / "missing.so")) is None
