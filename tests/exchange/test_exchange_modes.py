"""What crosses the network: exact sums, changes in 16 bits; beside them, how many devices train side by side."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from backbones import make_config
from tiny import final_prompts, metrics, run_dir

from fedhpc.checkpoint.files import SERVER_FILE
from fedhpc.checkpoint.state_file import open_state
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.exchange.encoding import make_encoding
from fedhpc.exchange.exact_sum import ZERO_EXPONENT, SumSize, Terms
from fedhpc.federation import packing
from fedhpc.federation.packing import choose_pack, largest_pack, probe
from fedhpc.job import control_groups
from fedhpc.methods import Population, make_method

SIZE, DEVICES = 1000, 9


def terms(vectors, coefficients):
    return Terms(
        coefficients=np.array(coefficients, np.int64).reshape(len(vectors), 2),
        vectors=vectors,
        of=SumSize(num_sums=2, size=SIZE, num_terms=DEVICES),
    )


def add_up(groups):
    """The sums [2, n] of the groups' terms, as ranks with one group each make them."""
    exponent = max(group.exponent for group in groups)
    return groups[0].of.floats(sum(group.fixed(exponent) for group in groups), exponent)


@pytest.fixture
def contributions():
    """Vectors whose elements differ by 40 powers of two, and numbers of examples."""
    rng = np.random.default_rng(3)
    scales = 2.0 ** rng.integers(-30, 10, (DEVICES, SIZE))
    vectors = list((rng.standard_normal((DEVICES, SIZE)) * scales).astype(np.float32))
    return vectors, np.stack([rng.integers(1, 5000, DEVICES), np.ones(DEVICES, np.int64)], axis=1)


def test_sums_are_exact_next_to_their_largest_term(contributions):
    vectors, coefficients = contributions
    found = add_up([terms(vectors, coefficients)])
    largest = max(c.max() * np.abs(v).max() for c, v in zip(coefficients, vectors, strict=True))
    for j in range(2):
        for n in range(0, SIZE, 50):
            exact = sum(Fraction(int(c[j])) * Fraction(float(v[n])) for c, v in zip(coefficients, vectors, strict=True))
            # Nine terms, each rounded to a multiple of 2^-58 times a power of two near the largest; then float64.
            assert abs(float(Fraction(float(found[j, n])) - exact)) <= 10 * 2**-57 * largest + abs(exact) * 2**-52


def test_sums_do_not_depend_on_order_and_grouping(contributions):
    vectors, coefficients = contributions
    expected = add_up([terms(vectors, coefficients)])
    order = np.random.default_rng(4).permutation(DEVICES)
    for sizes in ([2, 3, 4], [1] * DEVICES, [9, 0, 0]):
        parts = np.split(order, np.cumsum(sizes)[:-1])
        groups = [terms([vectors[i] for i in part], coefficients[part]) for part in parts]
        np.testing.assert_array_equal(add_up(groups), expected)
    in_floats = [sum(vectors[i].astype(np.float64) for i in some) for some in (order, order[::-1])]
    assert not np.array_equal(*in_floats)


@pytest.mark.parametrize("value", [3.4e38, 1e-45, 0.0])
def test_sums_of_extreme_numbers(value):
    vectors = [np.full(SIZE, sign * value, np.float32) for sign in (1, 1, 1)]
    found = add_up([terms(vectors, [[1 << 20, 1]] * 3)])
    np.testing.assert_array_equal(found[1], 3 * np.float64(vectors[0][0]))
    np.testing.assert_array_equal(found[0], 3 * 2.0**20 * np.float64(vectors[0][0]))
    assert terms([], []).exponent == terms([np.zeros(SIZE, np.float32)], [[7, 1]]).exponent == ZERO_EXPONENT


def encoding(dtype):
    config = make_config("unused", exchange={"dtype": dtype})
    return make_encoding(
        config, make_method(config.server, Population(num_devices=10, sample_rate=1.0, total_count=100))
    )


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_what_rounding_takes_away_goes_up_later(dtype, bits):
    """Error feedback: after any number of rounds the server lacks no more than the rounding of the last one."""
    coder, kept = encoding(dtype), {}
    rng = np.random.default_rng(0)
    start = rng.standard_normal(SIZE).astype(np.float32)
    change = np.float32(1e-2) * rng.standard_normal(SIZE).astype(np.float32)
    arrived = np.zeros(SIZE)
    for count in range(1, 20):
        payload, kept = coder.encode(start + change, start, kept, num_steps=1, learning_rate=0.1)
        assert payload.nbytes == 2 * SIZE
        arrived += coder.decode(payload, np.zeros_like(start))
        lacking = np.abs(count * change - arrived)
        # One rounding of about the change (2^-bits of up to twice it), and those of float32 in P_i - P^t.
        assert (lacking <= 2.0**-bits * 2 * np.abs(change) + count * 1e-6).all()
    once = torch.tensor(change).to(getattr(torch, dtype)).double().numpy()
    assert np.abs(20 * (once - change)).max() > 4 * lacking.max()


def test_sixteen_bits_never_overflow():
    coder = encoding("float16")
    start = np.zeros(2, np.float32)
    payload, kept = coder.encode(np.array([1e6, -1e6], np.float32), start, {}, num_steps=1, learning_rate=1)
    np.testing.assert_array_equal(coder.decode(payload, start), [65504, -65504])
    np.testing.assert_array_equal(kept["residual"], [1e6 - 65504, 65504 - 1e6])


@pytest.mark.parametrize(
    ("method", "weights"), [("fedavg", "examples"), ("fedavg", "uniform"), ("fedpeptao", "uniform")]
)
def test_sums_give_the_results_of_the_uploads(run_config, fedhpc, method, weights):
    changes = {"server__method": method, "server__weights": weights, "trace": False, "federation__rounds": 5}
    gathered, summed = run_config("gathered", **changes), run_config("summed", **changes, exchange__mode="reduce")
    for config in (gathered, summed):
        assert fedhpc("run", config)[0] == 0
    ours, theirs = (np.frombuffer(final_prompts(config), np.float32) for config in (summed, gathered))
    # Devices train from parameters that differ in their last bits; five rounds of Adam magnify that.
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    np.testing.assert_allclose(*[metrics(config)[0]["update_norm"] for config in (summed, gathered)], rtol=1e-6)
    where_control_is = {kind: any((run_dir(summed) / "checkpoints" / kind).iterdir()) for kind in ("control", "local")}
    assert where_control_is == {"control": False, "local": True}


def test_sixteen_bits_halve_the_upload_and_hardly_change_the_result(run_config, fedhpc):
    exact, rounded = run_config("exact"), run_config("rounded", exchange__dtype="bfloat16")
    for config in (exact, rounded):
        assert fedhpc("run", config)[0] == 0
    ours, theirs = (np.frombuffer(final_prompts(config), np.float32) for config in (rounded, exact))
    assert not np.array_equal(ours, theirs)
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exchange__mode": "reduce"}, "trace: true writes each upload; it needs exchange.mode: gather"),
        ({"exchange__mode": "reduce", "trace": False, "exchange__dtype": "float16"}, "sums are exact"),
        ({"exchange__mode": "reduce", "trace": False, "server__variant": "paper"}, "paper needs each upload"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(run_config, fedhpc, changes, message):
    status, _, err = fedhpc("run", run_config(**changes))
    assert status == 2
    assert message in err


def test_the_pack_is_measured_once_and_kept(run_config, fedhpc):
    config = run_config(device__pack="auto", federation__sample_rate=1.0, federation__rounds=2)
    assert fedhpc("run", config, "--set", "federation.rounds=1")[0] == 0
    assert "device.pack: auto: " in (run_dir(config) / "log.txt").read_text()
    assert fedhpc("run", config)[0] == 0
    assert (run_dir(config) / "log.txt").read_text().count("device.pack: auto: ") == 1
    checkpoints = Checkpoints(run_dir(config))
    packs = []
    for position in checkpoints.positions():
        path = checkpoints.path(position) / SERVER_FILE
        with open_state(path.read_bytes(), "") as file:
            packs.append(int(file.attrs["pack"]))
    assert len(packs) == 2
    assert packs[0] == packs[1] >= 1
    fixed = run_config("fixed", device__pack=packs[0], federation__sample_rate=1.0, federation__rounds=2)
    assert fedhpc("run", fixed)[0] == 0
    assert final_prompts(fixed) == final_prompts(config)


def test_a_larger_pack_has_to_be_worth_it():
    inf = math.inf
    assert choose_pack(np.array([[1.0, 0.99, 0.6, 0.59, inf, inf]])) == 4
    assert choose_pack(np.array([[1.0, 0.5, 0.2, inf, inf, inf], [1.0, 0.5, inf, inf, inf, inf]])) == 2
    assert [largest_pack(*numbers) for numbers in ((10, 16), (10, 4), (100, 9), (1000, 1))] == [1, 2, 8, 32]


def test_no_more_devices_side_by_side_than_memory_holds(monkeypatch):
    tried = []

    def train(pack, longest):
        tried.append(pack if longest else -pack)
        if pack > 4:
            raise torch.OutOfMemoryError
        return 3

    seconds = probe(train, largest=32, ranks_here=1)
    assert tried == [1, -1, 2, -2, 4, -4, 8]
    assert np.isfinite(seconds).tolist() == [True, True, True, False, False, False]

    # 8 devices need 4 more than 4 do; 16 would need another 8 in each of two processes, and 15 are free.
    peak = [0]
    monkeypatch.setattr(packing, "_peak_bytes", lambda: peak[0])
    monkeypatch.setattr(packing, "available_bytes", lambda: 15)

    def greedy(pack, longest):
        peak[0] = max(peak[0], pack)
        return 1

    seconds = probe(greedy, largest=32, ranks_here=2)
    assert np.isfinite(seconds).sum() == 4


@pytest.mark.parametrize(
    ("version", "listing"),
    [("", "0::/slurm/job_7/step_0/task_0\n"), ("memory", "4:memory:/slurm/job_7/step_0/task_0\n0::/\n")],
)
def test_memory_is_bounded_by_the_jobs_control_group(monkeypatch, tmp_path, version, listing):
    """SLURM limits job and step; the task's own group, the innermost, has no limit. Cached files give way."""
    limit, used, cached = packing.MEMORY_FILES[version]
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    for folder, most, now in (("job_7", "1000", 300), ("job_7/step_0", "900", 250), ("job_7/step_0/task_0", "max", 9)):
        group = tmp_path / version / "slurm" / folder
        group.mkdir(parents=True)
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"anon 200\n{cached} 40\n")
    assert min(packing.left_in_groups(listing)) == 690
