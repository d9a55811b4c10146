"""Server updates: hand-computed rounds, and the vectors of an independent implementation where they are at hand."""

import dataclasses
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedhpc.config import section_of
from fedhpc.errors import ConfigError
from fedhpc.methods import FedAvg, LocalRule, Population, make_method
from fedhpc.methods.base import ReusedMemory
from fedhpc.methods.updates import RoundUploads
from fedhpc.registry import METHODS

VECTORS = Path(os.environ.get("FEDHPC_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))
VARIANTS = ("drift_corrected", "paper", "released")
P0 = np.array([1.0, -2.0], np.float32)
GRADIENTS = [np.array([2, 0], np.float32), np.array([0, 4], np.float32)]


def method(num_devices=4, sample_rate=0.5, total_count=8, **config):
    population = Population(num_devices=num_devices, sample_rate=sample_rate, total_count=total_count)
    return make_method(section_of(METHODS, **config), population)


def uploads(params, ids=(2, 0), examples=(1, 3), steps=(2, 4), eta=0.5, gradients=(), counts=None):
    return RoundUploads(
        device_ids=np.array(ids),
        num_examples=np.array(examples),
        counts=np.array(counts or examples),
        num_steps=np.array(steps),
        params=np.array(params, np.float32),
        device_learning_rate=eta,
        gradients=gradients,
    )


def test_fedavg_is_the_mean_weighted_by_examples():
    fedavg = method(method="fedavg")
    state = fedavg.update(fedavg.init(P0), uploads([[0, 4], [8, 0]]))
    # 1/4 [0, 4] + 3/4 [8, 0]
    assert state.params.tolist() == [6.0, 1.0]
    assert (state.round, state.params.dtype) == (1, np.float32)


def test_the_mean_is_weighted_by_what_uploads_count():
    fedavg = method(method="fedavg")
    state = fedavg.update(fedavg.init(P0), uploads([[0, 4], [8, 0]], examples=(1, 3), counts=(6, 2)))
    assert state.params.tolist() == [2.0, 3.0]


def test_scaffold_with_uniform_weights_is_the_papers():
    chosen = method(method="scaffold", learning_rate=0.5, num_devices=4, total_count=4)
    first = chosen.update(chosen.init(P0), uploads([[0, -2], [3, -2]], examples=(1, 3), counts=(1, 1)))
    # algorithm 1: P + eta_s / |S| sum (P_i - P); c + 1/N sum (c_i+ - c_i), with c_2+ = [1, 0] and c_0+ = [-1, 0]
    assert first.params == pytest.approx([1.25, -2])
    assert first.vectors["control_global"] == pytest.approx([0, 0])


def test_drift_corrected_with_nothing_to_correct_is_plain_averaging():
    corrected = method(variant="drift_corrected", momentum=0.0, learning_rate=1.0)
    equal_steps = uploads([[0, 4], [8, 0]], steps=(3, 3))
    assert corrected.update(corrected.init(P0), equal_steps).params == pytest.approx([6.0, 1.0])


def test_drift_corrected_by_hand():
    corrected = method(variant="drift_corrected", momentum=0.5, learning_rate=2.0)
    first = corrected.update(corrected.init(P0), uploads([[0, -2], [3, -2]]))
    # d_2 = ([1,-2] - [0,-2]) / (2 * 0.5) = [1, 0]; d_0 = ([1,-2] - [3,-2]) / (4 * 0.5) = [-1, 0]
    # m = 1/4 * 0.5 * [1,0] + 3/4 * 0.5 * [-1,0] = [-0.25, 0], unbiased by 1 / (1 - 0.5) = [-0.5, 0]
    # sum w_i K_i = 1/4 * 2 + 3/4 * 4 = 3.5; P = [1,-2] - 2 * 3.5 * 0.5 * [-0.5, 0] = [2.75, -2]
    assert first.params == pytest.approx([2.75, -2.0])
    assert first.vectors["momentum"] == pytest.approx([-0.25, 0.0])
    # c = 1/4 ([1,0] + [-1,0]) = 0; c_2 = [1,0], c_0 = [-1,0]
    assert first.vectors["control_global"] == pytest.approx([0.0, 0.0])
    assert {device: c.tolist() for device, c in first.control.items()} == {2: [1.0, 0.0], 0: [-1.0, 0.0]}

    second = corrected.update(first, uploads([[2.75, -4]], ids=(2,), examples=(5,), steps=(2,)))
    # d_2 = [0, 2]; less c_2, plus c = 0: [-1, 2]; m = 0.5 [-0.25, 0] + 0.5 [-1, 2] = [-0.625, 1]
    # unbiased by 1 / (1 - 0.25); P = [2.75, -2] - 2 * 2 * 0.5 * 4/3 * [-0.625, 1]
    assert second.params == pytest.approx([2.75 + 2.5 / 1.5, -2 - 4 / 1.5])
    # c += 1/4 (d_2 - c_2) = 1/4 [-1, 2]
    assert second.vectors["control_global"] == pytest.approx([-0.25, 0.5])
    assert second.control[2].tolist() == [0.0, 2.0]
    assert second.control[0].tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_paper_and_released_by_hand(variant):
    # With one device in a round there is nothing to pile up: both are the same.
    chosen = method(num_devices=4, sample_rate=0.5, variant=variant, momentum=0.5, learning_rate=0.1)
    first = chosen.update(chosen.init(P0), uploads([[0, -2], [3, -2]]))
    # Round 0 is plain averaging: 1/4 [0,-2] + 3/4 [3,-2]; delta = [1,-2] - [2.25,-2]
    assert first.params == pytest.approx([2.25, -2.0])
    assert first.vectors["previous_delta"] == pytest.approx([-1.25, 0.0])
    assert first.vectors["momentum"].tolist() == [0.0, 0.0]
    # c_2 = [1,0], c_0 = [-1,0] as above; c = 0.5 * (2/6 [1,0] + 4/6 [-1,0])
    assert first.vectors["control_global"] == pytest.approx([-1 / 6, 0.0])

    second = chosen.update(first, uploads([[2.25, -4]], ids=(2,), examples=(5,), steps=(2,)))
    # c_2 = [1,0] - [-1/6,0] + [0,2] = [7/6, 2]; c = [-1/6,0] + 0.5 * 1 * ([7/6,2] - [1,0]) = [-1/12, 1]
    assert second.control[2] == pytest.approx([7 / 6, 2.0])
    assert second.vectors["control_global"] == pytest.approx([-1 / 12, 1.0])
    # eta_s = 0.099; delta = [0, 2]; g = [-1.25, 0] - [0, 2]; v = 0.5 g + c - c_2 = [-0.625 - 1.25, -1 - 1]
    assert second.scalars["server_learning_rate"] == pytest.approx(0.099)
    assert second.vectors["momentum"] == pytest.approx([-1.875, -2.0])
    assert second.params == pytest.approx([2.25 + 0.099 * 1.875, -4 + 0.099 * 2])


@pytest.mark.parametrize(
    ("variant", "mean_step"),
    [
        # 1/4 v_2 + 3/4 v_0; with steps that pile up 1/4 v_2 + 3/4 (v_2 + v_0) = v_2 + 3/4 v_0
        ("paper", [-1.078125, -1.1354167]),
        ("released", [-1.875 - 0.75 * 0.8125, -23 / 12 - 0.75 * 21 / 24]),
    ],
)
def test_paper_and_released_go_from_device_to_device_in_sampled_order(variant, mean_step):
    chosen = method(num_devices=4, sample_rate=0.5, variant=variant, momentum=0.5, learning_rate=0.1)
    first = chosen.update(chosen.init(P0), uploads([[0, -2], [3, -2]]))
    second = chosen.update(first, uploads([[2.25, -4], [2.25, -2]], ids=(2, 0), examples=(1, 3), steps=(2, 4)))
    # From [2.25, -2] with c = [-1/6, 0], c_2 = [1, 0], c_0 = [-1, 0] as above:
    # c_2 = [1, 0] - [-1/6, 0] + [0, 2] = [7/6, 2]; c_0 = [-1, 0] - [-1/6, 0] + [0, 0] = [-5/6, 0]
    # c = [-1/6, 0] + 0.5 * (2/6 ([7/6, 2] - [1, 0]) + 4/6 ([-5/6, 0] - [-1, 0])) = [-1/12, 1/3]
    assert second.vectors["control_global"] == pytest.approx([-1 / 12, 1 / 3])
    # Pbar = [2.25, -2.5]; delta = [0, 0.5]; g = [-1.25, 0] - [0, 0.5]
    # v_2 = 0.5 g + c - c_2 = [-1.875, -23/12]; v_0 = 0.5 v_2 + 0.5 g + c - c_0 = [-0.8125, -21/24]
    # Momentum goes on from the mean of the v, however long the steps are.
    assert second.vectors["momentum"] == pytest.approx([-1.078125, -1.1354167])
    assert second.params == pytest.approx([2.25 - 0.099 * mean_step[0], -2.5 - 0.099 * mean_step[1]])


def test_the_server_learning_rate_of_paper_stops_falling():
    paper = method(num_devices=4, sample_rate=0.5, variant="paper", momentum=0.5, learning_rate=1.005e-4)
    state = paper.update(paper.init(P0), uploads([[0, -2], [3, -2]]))
    state = paper.update(state, uploads([[0, -2], [3, -2]]))
    assert state.scalars["server_learning_rate"] == 1e-4


@pytest.mark.parametrize("variant", ["fedavg", "drift_corrected"])
def test_the_order_of_the_uploads_does_not_matter_to_the_last_bit(variant):
    rng = np.random.default_rng(0)
    params = rng.standard_normal((5, 1000)).astype(np.float32)
    ids, order = np.arange(5), np.array([3, 1, 4, 0, 2])
    chosen = method(method="fedavg") if variant == "fedavg" else method(variant=variant)
    state = chosen.init(rng.standard_normal(1000).astype(np.float32))
    sizes, steps = np.array([7, 11, 13, 17, 19]), np.array([1, 2, 3, 4, 5])
    one = chosen.update(state, uploads(params, ids, sizes, steps))
    other = chosen.update(state, uploads(params[order], ids[order], sizes[order], steps[order]))
    assert one.params.tobytes() == other.params.tobytes()


def test_drift_corrected_without_control_variates_is_momentum_alone():
    chosen = method(variant="drift_corrected", momentum=0.5, learning_rate=2.0, control_variates=False)
    first = chosen.update(chosen.init(P0), uploads([[0, -2], [3, -2]]))
    assert first.params == pytest.approx([2.75, -2.0])  # as with them: they start at zero
    assert (first.vectors.keys(), first.control) == ({"momentum"}, {})
    second = chosen.update(first, uploads([[2.75, -4]], ids=(2,), examples=(5,), steps=(2,)))
    # d_2 = [0, 2]; m = 0.5 [-0.25, 0] + 0.5 [0, 2] = [-0.125, 1], unbiased by 1 / (1 - 0.25)
    # P = [2.75, -2] - 2 * 2 * 0.5 * [-1/6, 4/3]
    assert second.params == pytest.approx([2.75 + 2 / 6, -2 - 8 / 3])


def test_fedprox_averages_and_pulls_devices_to_the_global_parameters():
    fedprox = method(method="fedprox", proximal=0.25)
    assert fedprox.update(fedprox.init(P0), uploads([[0, 4], [8, 0]])).params.tolist() == [6.0, 1.0]
    assert fedprox.local_rule({}, {}) == LocalRule(proximal=0.25)


@pytest.mark.parametrize("name", ["fedavgm", "moms_adamd"])
def test_fedavgm_by_hand(name):
    chosen = method(method=name, learning_rate=0.5, momentum=0.9)
    first = chosen.update(chosen.init(P0), uploads([[0, 4], [8, 0]]))
    # Pbar = [6, 1]; v = [1, -2] - [6, 1] = [-5, -3]; P = [1, -2] + 0.5 [5, 3]
    assert first.params == pytest.approx([3.5, -0.5])
    second = chosen.update(first, uploads([[3.5, -0.5], [3.5, -4.5]]))
    # Pbar = [3.5, -3.5]; v = 0.9 [-5, -3] + [0, 3] = [-4.5, 0.3]; P = [3.5, -0.5] - 0.5 v
    assert second.params == pytest.approx([5.75, -0.65])
    assert second.vectors["momentum"] == pytest.approx([-4.5, 0.3])


@pytest.mark.parametrize(
    ("name", "first_v", "second_v"),
    [
        # tau = 0.5, v_0 = 0.25, beta_2 = 0.75, Delta_1^2 = [25, 9], Delta_2^2 = [0.25, 1]
        # Adam: 0.75 * 0.25 + 0.25 Delta^2; then 0.75 v + 0.25 Delta^2
        ("fedadam", [6.4375, 2.4375], [0.75 * 6.4375 + 0.0625, 0.75 * 2.4375 + 0.25]),
        # Yogi: 0.25 + 0.25 Delta^2, as Delta^2 is larger than 0.25; then it is smaller than v: v - 0.25 Delta^2
        ("fedyogi", [6.5, 2.5], [6.5 - 0.0625, 2.5 - 0.25]),
    ],
)
def test_adaptive_servers_follow_reddis_algorithm_2(name, first_v, second_v):
    chosen = method(method=name, learning_rate=0.1, momentum=0.5, second_momentum=0.75, tau=0.5)
    first = chosen.update(chosen.init(P0), uploads([[0, 4], [8, 0]]))
    # Delta = [6, 1] - [1, -2] = [5, 3]; m = 0.5 Delta; P + 0.1 m / (sqrt(v) + tau)
    assert first.vectors["second_moment"] == pytest.approx(first_v)
    expected = [p + 0.1 * m / (v**0.5 + 0.5) for p, m, v in zip(P0, (2.5, 1.5), first_v, strict=True)]
    assert first.params == pytest.approx(expected)
    start = dataclasses.replace(first, params=P0)
    second = chosen.update(start, uploads([[1.5, -1], [1.5, -1]]))
    # Delta = [0.5, 1]; m = 0.5 [2.5, 1.5] + 0.5 Delta = [1.5, 1.25]
    assert second.vectors["momentum"] == pytest.approx([1.5, 1.25])
    assert second.vectors["second_moment"] == pytest.approx(second_v)
    expected = [p + 0.1 * m / (v**0.5 + 0.5) for p, m, v in zip(P0, (1.5, 1.25), second_v, strict=True)]
    assert second.params == pytest.approx(expected)


def test_scaffold_by_hand():
    chosen = method(method="scaffold", learning_rate=0.5, total_count=8)
    first = chosen.update(chosen.init(P0), uploads([[0, -2], [3, -2]]))
    # changes [-1, 0] and [2, 0]; mean 1/4 [-1, 0] + 3/4 [2, 0] = [1.25, 0]; P = [1, -2] + 0.5 [1.25, 0]
    assert first.params == pytest.approx([1.625, -2])
    # c_2+ = [1, 0] / (2 * 0.5) = [1, 0]; c_0+ = [-2, 0] / (4 * 0.5) = [-1, 0]
    # c = 1/8 [1, 0] + 3/8 [-1, 0]
    assert first.vectors["control_global"] == pytest.approx([-0.25, 0])
    sent = {"control_global": first.vectors["control_global"]}
    facts = {"num_steps": 2, "learning_rate": 0.5}
    zero = {"control_global": np.zeros(2, np.float32)}
    kept = chosen.kept_after(P0, np.array([0, -2], np.float32), zero, {}, **facts)
    assert kept["control"].tolist() == [1, 0]
    assert chosen.local_rule(sent, kept).step_shift.tolist() == [-1.25, 0]  # c - c_2
    # The next round: c_2 = [1, 0] - [-0.25, 0] + ([1.625, -2] - [0.625, -3]) / (2 * 0.5) = [2.25, 1]
    end = np.array([0.625, -3], np.float32)
    assert chosen.kept_after(first.params, end, sent, kept, **facts)["control"].tolist() == [2.25, 1]
    second = chosen.update(first, uploads([end], ids=(2,), examples=(1,), steps=(2,)))
    # c = [-0.25, 0] + 1/8 (c_2+ - c_2) = [-0.25, 0] + 1/8 [1.25, 1]
    assert second.vectors["control_global"] == pytest.approx([-0.09375, 0.125])


def test_mime_by_hand():
    chosen = method(method="mime", momentum=0.75)
    first = chosen.update(chosen.init(P0), uploads([[0, 4], [8, 0]], gradients=GRADIENTS))
    # gradients [2, 0] and [0, 4]: m = 1/4 (1/4 [2, 0] + 3/4 [0, 4])
    assert first.params.tolist() == [6.0, 1.0]
    assert first.vectors["momentum"] == pytest.approx([0.125, 0.75])
    rule = chosen.local_rule({"momentum": first.vectors["momentum"]}, {})
    assert (rule.gradient_scale, rule.gradient_shift.tolist()) == (0.25, [0.09375, 0.5625])
    second = chosen.update(first, uploads([[0, 4], [8, 0]], gradients=GRADIENTS))
    assert second.vectors["momentum"] == pytest.approx([0.125 + 0.09375, 0.75 + 0.5625])


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "fedpeptao"), *VARIANTS])
def test_an_update_leaves_the_old_state_as_it_was(name):
    chosen = method(variant=name) if name in VARIANTS else method(method=name)
    gradients = GRADIENTS if chosen.uploads_gradient else ()
    old = chosen.update(chosen.init(P0), uploads([[0, 4], [8, 0]], gradients=gradients))
    kept = {key: vector.copy() for key, vector in {"params": old.params, **old.vectors}.items()}
    control = {device: vector.copy() for device, vector in old.control.items()}
    new = chosen.update(old, uploads([[1, 1], [2, 2]], gradients=gradients))
    assert new.round == 2
    for key, vector in {"params": old.params, **old.vectors}.items():
        assert np.array_equal(vector, kept[key])
    assert old.control.keys() == control.keys()
    assert all(np.array_equal(old.control[device], control[device]) for device in control)


@pytest.mark.parametrize("name", VARIANTS)
def test_control_variates_leave_memory_without_the_other_vectors(name):
    fedpeptao = method(variant=name)
    state = fedpeptao.update(fedpeptao.init(P0), uploads([[0, 4], [8, 0]]))
    kept = [vector.base for vector in (state.params, *state.vectors.values())]
    assert not any(vector.base is piece for vector in state.control.values() for piece in kept)


def test_memory_is_used_again_once_nobody_sees_any_of_it():
    memory = ReusedMemory()
    first = memory.empty(2, 3)
    part = first[1][:2]
    del first
    second, third = memory.empty(2, 3), memory.empty(2, 3)
    assert not any(np.may_share_memory(part, other) for other in (second, third))
    address = second.ctypes.data
    del second
    assert memory.empty(2, 3).ctypes.data == address
    assert memory.empty(3, 3).shape == (3, 3)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="no number vectors; FEDHPC_VECTORS names their folder")
@pytest.mark.parametrize("name", ["fedavg", *VARIANTS])
def test_vectors_of_an_independent_implementation(name):
    with h5py.File(VECTORS / f"server_{name}.h5") as file:
        config = {"method": "fedavg"}
        if name != "fedavg":
            config = {"variant": name, "momentum": float(file.attrs["momentum"])}
            config["learning_rate"] = float(file.attrs["server_learning_rate"])
        chosen = method(int(file.attrs["num_devices"]), float(file.attrs["sample_rate"]), **config)
        rounds = sorted(key for key in file if key.startswith("round_"))
        assert len(rounds) == 6
        state = chosen.init(file[rounds[0]]["broadcast"][()].ravel())
        for key in rounds:
            entry = file[key]
            assert_close(state.params, entry["broadcast"])
            # Go on from the vectors' own float32, so that one rounding does not feed the next round.
            state = dataclasses.replace(state, params=entry["broadcast"][()].ravel())
            given = RoundUploads(
                device_ids=entry["device_ids"][()],
                num_examples=entry["num_examples"][()],
                counts=entry["num_examples"][()],
                num_steps=entry["num_steps"][()],
                params=entry["uploads"][()].reshape(len(entry["uploads"]), -1),
                device_learning_rate=float(file.attrs["device_learning_rate"]),
            )
            state = chosen.update(state, given)
            assert_close(state.params, entry["result"])
        final = file["final"]
        for vector in state.vectors.keys() & final.keys():
            assert_close(state.vectors[vector], final[vector])
        if "control_devices" in final:
            assert sorted(state.control) == final["control_device_ids"][()].tolist()
            for device, expected in zip(final["control_device_ids"], final["control_devices"], strict=True):
                assert_close(state.control[int(device)], expected)
        assert (name == "fedavg") == (not state.vectors)


def assert_close(ours, expected):
    expected = np.asarray(expected).ravel()
    assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.skipif(not VECTORS.is_dir(), reason="no number vectors; FEDHPC_VECTORS names their folder")
def test_layer_scores_of_an_independent_implementation():
    from fedhpc.selection.strategies.score import layer_score
    from fedhpc.selection.strategy import global_scores

    with h5py.File(VECTORS / "layer_scores.h5") as file:
        scores = []
        for device in range(len(file["num_examples"])):
            entry = file[f"device_{device}"]
            scores.append([layer_score(hidden) for hidden in entry["hidden_states"]])
            assert scores[-1] == pytest.approx(entry["scores"][()], rel=1e-6)
        assert global_scores(np.array(scores), file["num_examples"][()]) == pytest.approx(file["scores"][()], rel=1e-6)


class NoState(FedAvg):
    def apply(self, state, sums, uploads):
        return sums.mean


class WrongType(FedAvg):
    def apply(self, state, sums, uploads):
        return dataclasses.replace(state, params=sums.mean)


class WrongShape(FedAvg):
    def apply(self, state, sums, uploads):
        return dataclasses.replace(state, params=np.float32(sums.mean.sum(keepdims=True)))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (NoState, "a step of NoState gave ndarray, not a ServerState"),
        (WrongType, "a step of WrongType made params of float64; vectors are float32"),
        (WrongShape, r"a step of WrongShape made vectors of shape \(1,\)"),
    ],
)
def test_a_step_that_makes_something_else_is_refused(part, words):
    wrong = part(section_of(METHODS, method="fedavg"), Population(num_devices=5, sample_rate=0.4, total_count=8))
    with pytest.raises(ConfigError, match=words):
        wrong.update(wrong.init(P0), uploads([[0, 4], [8, 0]]))
