import re
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import NUM_TOKENS, VOCABULARY, load_backbone, make_config, read_tuning, save_backbone

from fedhpc.checkpoint.device_state import DeviceState, UnfinishedUpdate
from fedhpc.data.prepared import Split
from fedhpc.device import local_update
from fedhpc.device.local_update import (
    Assignment,
    DeviceUpdate,
    batches,
    local_updates,
)
from fedhpc.errors import Halt
from fedhpc.federation.schedule import learning_rate
from fedhpc.methods.base import UNCHANGED, LocalRule
from fedhpc.tuning.base import as_parameters

LAYERS = (0, 2)
ALL = np.arange(11)
OURS = np.array([10, 3, 7, 1, 5])
LAYER_SIZE = 2 * NUM_TOKENS * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("update"), "llama-gqa")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, "llama-gqa")


def make_split():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 10, len(ALL))
    return Split(
        tokens=rng.integers(4, VOCABULARY, lengths.sum()),
        offsets=np.cumsum([0, *lengths]),
        labels=rng.integers(0, 3, len(ALL)),
        slots=lengths - 1,
        pad_id=1,
    )


class Device:
    """A device between its rounds."""

    def __init__(
        self, folder, backbone, *, layers=LAYERS, model=None, tuning=None, sparse=None, seed=1, pack=1, **device
    ):
        self.config = make_config(
            folder,
            seed=seed,
            model=model or {},
            tuning=tuning or {},
            sparse=sparse or {},
            device={"epochs": 2, "batch_size": 2, "learning_rate": 0.01, **device},
        )
        self.backbone, self.layers, self.pack = backbone, layers, pack
        self.tuning = read_tuning(folder, **(tuning or {}))
        self.tensors = self.tuning.initial(1)
        self.start, local = self.tuning.split(self.tensors, layers)
        self.state = DeviceState(local=local)

    def update(self, *, round_index=0, device=4, examples=OURS, begun=None, rule=UNCHANGED, out=None, **beat):
        assignment = Assignment(device=device, state=self.state, examples=examples, begun=begun, rule=rule, out=out)
        ((_, update),) = self.updates([assignment], round_index=round_index, **beat).items()
        return update

    def updates(self, assignments, *, round_index=0, **beat):
        found = {}
        with suppress(Halt):
            for device, update in local_updates(
                self.config,
                self.backbone,
                self.tuning,
                self.layers,
                start=self.start,
                assignments=assignments,
                split=make_split(),
                round_index=round_index,
                pack=self.pack,
                **beat,
            ):
                found[device] = update
        return found


class AdamW:
    """Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019), algorithm 2, on one float64 vector."""

    def __init__(self, size):
        self.first, self.second, self.step = np.zeros(size), np.zeros(size), 0

    def apply(self, vector, gradient, *, rate, decay):
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.step)
        second = self.second / (1 - 0.999**self.step)
        return vector - rate * decay * vector - rate * first / (np.sqrt(second) + 1e-8)


def gradient_at(device, vector, examples):
    """Loss and gradient of one batch with respect to all prompts, as one vector."""
    params = as_parameters({"prompts": vector.reshape(3, 2, NUM_TOKENS, 16).astype(np.float32)}, torch.device("cpu"))
    batch = make_split().batch(examples)
    loss = device.tuning.losses(device.tuning.forward(device.backbone, [params], batch), batch.labels).mean()
    (gradient,) = torch.autograd.grad(loss, params["prompts"])
    return loss.item(), gradient.double().numpy().ravel()


def clip(device, gradient):
    """A gradient no longer than `device.max_grad_norm`."""
    return gradient * min(1, device.config.device.max_grad_norm / np.linalg.norm(gradient))


def whole(device, update):
    """All prompts after an update, as one vector."""
    return device.tuning.merge(update.params, update.state.local, device.layers)["prompts"].ravel()


@pytest.mark.parametrize(("max_grad_norm", "weight_decay"), [(0.02, 0.1), (100.0, 0.0)])
def test_an_update_is_adamw_with_clipped_gradients(folder, backbone, max_grad_norm, weight_decay):
    device = Device(folder, backbone, max_grad_norm=max_grad_norm, weight_decay=weight_decay)
    vector = device.tensors["prompts"].astype(np.float64).ravel()
    optimizer, losses, norms = AdamW(vector.size), [], []
    for examples in batches(device.config, OURS, make_split().lengths[OURS], round_index=3, device=4):
        loss, gradient = gradient_at(device, vector, examples)
        vector = optimizer.apply(vector, clip(device, gradient), rate=0.01, decay=weight_decay)
        losses += [loss] * len(examples)
        norms.append(np.linalg.norm(gradient))
    update = device.update(round_index=3)
    assert (max(norms) > max_grad_norm) == (max_grad_norm < 1)
    np.testing.assert_allclose(whole(device, update), vector, rtol=1e-4, atol=1e-5)
    assert np.abs(vector - device.tensors["prompts"].ravel()).max() > 0.03
    assert update.loss == pytest.approx(np.mean(losses), rel=1e-5)


RULES = {
    "proximal": LocalRule(proximal=50.0),
    "momentum": LocalRule(gradient_scale=0.25, gradient_shift=np.linspace(-0.01, 0.01, 2 * LAYER_SIZE, dtype="f4")),
    "control": LocalRule(step_shift=np.linspace(-0.5, 0.5, 2 * LAYER_SIZE, dtype="f4")),
}


@pytest.mark.parametrize("max_grad_norm", [0.02, 100.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("rule", RULES)
def test_a_method_changes_the_steps_of_the_exchanged_layers(folder, backbone, rule, optimizer, max_grad_norm):
    """optimizer(scale clip(g + mu (P - P^t)) + shift) + step_shift, written out for one float64 vector."""
    device = Device(folder, backbone, max_grad_norm=max_grad_norm, optimizer=optimizer, weight_decay=0.1)
    update = device.update(rule=RULES[rule])
    chosen = RULES[rule]
    vector = start = device.tensors["prompts"].ravel().astype(np.float64)
    exchanged = np.repeat([layer in LAYERS for layer in range(3)], LAYER_SIZE)
    shift, step_shift = np.zeros(3 * LAYER_SIZE), np.zeros(3 * LAYER_SIZE)
    for target, source in ((shift, chosen.gradient_shift), (step_shift, chosen.step_shift)):
        target[exchanged] = 0 if source is None else source
    scale = np.where(exchanged, chosen.gradient_scale, 1)
    adamw = AdamW(vector.size)
    for examples in batches(device.config, OURS, make_split().lengths[OURS], round_index=0, device=4):
        _, gradient = gradient_at(device, vector, examples)
        gradient = clip(device, gradient + chosen.proximal * exchanged * (vector - start))
        gradient = scale * gradient + shift
        if optimizer == "adamw":
            vector = adamw.apply(vector, gradient, rate=0.01, decay=0.1)
        else:
            vector = vector - 0.01 * 0.1 * vector - 0.01 * gradient
        vector = vector - 0.01 * step_shift
    plain = whole(device, device.update())
    assert np.abs(vector - plain).max() > 1e-5
    np.testing.assert_allclose(whole(device, update), vector, rtol=0, atol=3e-6)


def test_the_gradient_at_the_start_is_that_of_the_whole_shard(folder, backbone):
    device = Device(folder, backbone, max_grad_norm=100.0)
    update = device.update(with_gradient=True)
    _, gradient = gradient_at(device, device.tensors["prompts"].ravel(), OURS)
    np.testing.assert_allclose(update.gradient, gradient.reshape(3, -1)[list(LAYERS)].ravel(), atol=1e-6)
    clipped = Device(folder, backbone, max_grad_norm=0.01).update(with_gradient=True)
    norm = np.linalg.norm(gradient)
    assert norm > 0.02
    np.testing.assert_allclose(clipped.gradient, update.gradient * (0.01 / norm), rtol=1e-3)


def test_counts_and_sizes(folder, backbone):
    update = Device(folder, backbone).update()
    assert (update.num_examples, update.num_steps, update.state.steps_taken) == (5, 2 * 3, 6)
    assert (update.params.shape, update.params.dtype) == ((2 * LAYER_SIZE,), np.float32)
    assert update.state.local.shape == (LAYER_SIZE,)
    assert update.state.moments is None


def test_the_loss_is_the_mean_over_examples(folder, backbone):
    device = Device(folder, backbone, learning_rate=1e-12)
    loss, _ = gradient_at(device, device.tensors["prompts"], OURS)
    assert device.update().loss == pytest.approx(loss, rel=1e-5)


def test_an_update_gives_the_same_bits_again_and_leaves_its_input_alone(folder, backbone):
    device = Device(folder, backbone)
    start, local = device.start.copy(), device.state.local.copy()
    first, second = device.update(), device.update()
    np.testing.assert_array_equal(first.params, second.params)
    np.testing.assert_array_equal(first.state.local, second.state.local)
    assert first.loss == second.loss
    np.testing.assert_array_equal(device.start, start)
    np.testing.assert_array_equal(device.state.local, local)


def test_an_update_starts_from_the_broadcast_and_from_the_devices_own_layers(folder, backbone):
    device = Device(folder, backbone, learning_rate=1e-12)
    device.start = np.full_like(device.start, 0.5)
    device.state = DeviceState(local=np.full_like(device.state.local, -0.5), steps_taken=10)
    update = device.update()
    np.testing.assert_allclose(update.params, 0.5)
    np.testing.assert_allclose(update.state.local, -0.5)
    assert update.state.steps_taken == 16


def test_an_update_is_written_where_it_is_wanted(folder, backbone):
    device, out = Device(folder, backbone), np.zeros(10_000, np.float32)
    part = out[100 : 100 + device.start.size]
    update = device.update(out=part)
    np.testing.assert_array_equal(part, device.update().params)
    assert np.may_share_memory(update.params, out)
    assert np.count_nonzero(out) == np.count_nonzero(part)


def test_kept_moments_go_on_from_round_to_round(folder, backbone):
    device = Device(folder, backbone, reset_moments=False, weight_decay=0.1)
    vector = device.tensors["prompts"].astype(np.float64).ravel()
    optimizer = AdamW(vector.size)
    for round_index in (0, 1):
        update = device.update(round_index=round_index)
        for examples in batches(device.config, OURS, make_split().lengths[OURS], round_index=round_index, device=4):
            _, gradient = gradient_at(device, vector, examples)
            vector = optimizer.apply(vector, clip(device, gradient), rate=0.01, decay=0.1)
        np.testing.assert_allclose(whole(device, update), vector, rtol=1e-3, atol=5e-5)
        assert update.state.moments["prompts.step"] == 6 * (round_index + 1)
        moment = update.state.moments["prompts.exp_avg"].ravel()
        np.testing.assert_allclose(moment, optimizer.first, atol=1e-3 * np.abs(optimizer.first).max())
        device.start, device.state = update.params, update.state

    device.state = DeviceState(local=device.state.local)
    forgetful = device.update(round_index=2)
    device.state = update.state
    remembering = [device.update(round_index=2).params for _ in range(2)]
    assert not np.allclose(forgetful.params, remembering[0], atol=1e-3)
    np.testing.assert_array_equal(*remembering)


def order(config, **where):
    return np.concatenate(list(batches(config, ALL, np.full(len(ALL), 9), **where))).tolist()


def test_every_epoch_sees_every_example_in_an_order_of_round_and_device(folder, backbone):
    config = Device(folder, backbone, batch_size=4).config
    parts = list(batches(config, ALL, np.full(len(ALL), 9), round_index=0, device=0))
    assert [sorted(map(len, parts[first : first + 3])) for first in (0, 3)] == [[3, 4, 4]] * 2
    assert len(parts) == 6
    first, second = np.concatenate(parts[:3]).tolist(), np.concatenate(parts[3:]).tolist()
    assert sorted(first) == sorted(second) == ALL.tolist()
    orders = [order(config, round_index=r, device=d) for r in (0, 1) for d in (0, 1)]
    orders.append(order(Device(folder, backbone, seed=2).config, round_index=0, device=0))
    assert len({tuple(found) for found in orders}) == 5
    assert len({tuple(found[:11]) for found in orders} | {tuple(second)}) == 6
    assert orders[0] == order(config, round_index=0, device=0)


def test_no_more_steps_than_are_allowed_and_others_in_each_round(folder, backbone):
    whole = Device(folder, backbone, batch_size=2).config
    few = Device(folder, backbone, batch_size=2, epochs=100, max_steps=3).config
    drawn = [order(few, round_index=r, device=4) for r in range(20)]
    assert drawn[0] == order(whole, round_index=0, device=4)[: len(drawn[0])]
    assert {len(found) for found in drawn} <= {5, 6}  # three batches; one of an epoch's six is short
    assert set().union(*drawn) == set(ALL.tolist())
    second_epoch = Device(folder, backbone, batch_size=2, epochs=3, max_steps=8).config
    begun = order(second_epoch, round_index=0, device=4)
    assert 15 <= len(begun) <= 16
    assert begun == order(whole, round_index=0, device=4)[: len(begun)]


def padded(parts, lengths):
    return sum(lengths[part].max() * len(part) for part in parts)


def test_texts_of_similar_length_share_a_batch(folder, backbone):
    config = Device(folder, backbone, epochs=1, batch_size=4).config
    lengths = np.random.default_rng(5).integers(5, 100, 400)
    examples = np.arange(10, 400)
    plans = [batches(config, examples, lengths[examples], round_index=r, device=2) for r in range(3)]
    for plan in plans:
        assert sorted(np.concatenate(plan)) == examples.tolist()
        tokens = lengths[examples].sum()
        assert (
            padded(plan, lengths) < 1.25 * tokens < 1.5 * tokens < padded(np.split(examples, range(4, 390, 4)), lengths)
        )
        means = [lengths[part].mean() for part in plan]
        first_longest = np.mean([means[i] == max(means[i : i + 4]) for i in range(0, 96, 4)])
        assert 0.05 < first_longest < 0.6  # a quarter, if the batches of a window come in any order
    together = [{tuple(sorted(part)) for part in plan} for plan in plans]
    assert len(together[0] & together[1]) < 5


def test_learning_rate(folder, backbone):
    config = make_config(folder, device={"learning_rate": 0.4, "schedule": "linear"}, federation={"rounds": 4})
    assert [learning_rate(config, t) for t in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    config = make_config(folder, device={"learning_rate": 0.4}, federation={"rounds": 4})
    assert [learning_rate(config, t) for t in range(4)] == [0.4] * 4

    after = {"learning_rate": 0.4, "warmup": 2}
    config = make_config(folder, device={**after, "schedule": "linear"}, federation={"rounds": 6})
    assert [learning_rate(config, t) for t in range(6)] == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])
    config = make_config(folder, device={**after, "schedule": "cosine"}, federation={"rounds": 6})
    cosine = [0.2 * (1 + np.cos(np.pi * part / 4)) for part in range(4)]
    assert [learning_rate(config, t) for t in range(6)] == pytest.approx([0.2, 0.4, *cosine])
    config = make_config(folder, device=after, federation={"rounds": 6})
    assert [learning_rate(config, t) for t in range(6)] == pytest.approx([0.2, *[0.4] * 5])
    long = make_config(folder, device={"schedule": "cosine"}, federation={"rounds": 10**9})
    assert learning_rate(long, 10**9 - 1) > 0  # methods divide by it

    falling = Device(folder, backbone, schedule="linear", epochs=1, batch_size=5)
    moved = [np.abs(falling.update(round_index=t).params - falling.start).max() for t in (0, 50, 99)]
    assert moved == pytest.approx([0.01, 0.005, 0.0001], rel=0.01)  # Adam's first step is the learning rate


def test_prompt_dropout_follows_seed_round_and_device(folder, backbone):
    device = Device(folder, backbone, tuning={"dropout": 0.5}, epochs=1, batch_size=5)
    torch.manual_seed(0)
    first = device.update()
    torch.rand(3)
    assert np.array_equal(device.update().params, first.params)
    # One batch of all examples: only dropout can differ.
    losses = {first.loss, device.update(round_index=1).loss, device.update(device=5).loss}
    losses.add(Device(folder, backbone, tuning={"dropout": 0.5}, epochs=1, batch_size=5, seed=2).update().loss)
    assert np.ptp(sorted(losses)) > 1e-3
    assert len(losses) == 4


def test_every_step_drops_other_elements(folder, backbone):
    one, four = (
        Device(folder, backbone, tuning={"dropout": 0.5}, epochs=epochs, batch_size=5, learning_rate=1e-12).update()
        for epochs in (1, 4)
    )
    # All examples in one batch, parameters that do not move: only dropout can make later losses differ.
    assert abs(four.loss - one.loss) > 1e-3


def test_backbone_dropout_follows_the_seed(folder, tmp_path):
    path = save_backbone(tmp_path, "gpt2")
    model = {"backbone_dropout": True}
    dropping = Device(path, load_backbone(path, "gpt2", **model), model=model)
    first = dropping.update()
    torch.rand(3)
    again = dropping.update()
    still = Device(path, load_backbone(path, "gpt2")).update()
    assert np.array_equal(first.params, again.params)
    assert first.loss == again.loss
    assert abs(first.loss - still.loss) > 1e-3


def test_a_linear_head_is_trained_and_uploaded(folder):
    device = Device(folder, load_backbone(folder, "llama-gqa", head="linear"), tuning={"head": "linear"})
    update = device.update()
    tensors = device.tuning.merge(update.params, update.state.local, LAYERS)
    assert all((tensors[name] != device.tensors[name]).any() for name in tensors)
    assert update.params.size == 2 * LAYER_SIZE + 3 * 32 + 3


def halt_before(step):
    """A stop that is requested while the steps before this one, counted from 1, are made."""
    said = []

    def beat(activity):
        said.append(activity)
        if len(said) == step:
            raise Halt

    return beat, said


def test_an_update_says_before_every_step_what_it_is_about_to_do(folder, backbone):
    beat, said = halt_before(None)
    Device(folder, backbone).update(round_index=3, beat=beat)
    assert said == [f"training in round 3: device 4 step {step} of 6" for step in range(1, 7)]


INTERRUPTED = {
    "plain": {},
    "moments kept": {"reset_moments": False},
    "dropout": {"tuning": {"dropout": 0.5}},
    "linear schedule": {"schedule": "linear"},
    "dropout of LoRA": {"tuning": {"kind": "lora", "targets": ["*_proj"], "dropout": 0.5}},
    "most steps": {"epochs": 9, "max_steps": 6},
}


@pytest.mark.parametrize("setting", INTERRUPTED)
def test_an_update_stopped_between_two_steps_goes_on_to_the_same_bits(folder, backbone, setting):
    device = Device(folder, backbone, **INTERRUPTED[setting])
    device.start, device.state = (first := device.update()).params, first.state
    whole_update = device.update(round_index=1)
    for stops in ([2], [4], [6], [3, 2], [2, 1, 1, 2]):
        begun, steps = None, 0
        for stop in stops:
            torch.rand(3)
            begun = device.update(round_index=1, begun=begun, beat=halt_before(stop)[0])
            steps += stop - 1
            assert isinstance(begun, UnfinishedUpdate)
            assert begun.losses.shape == (steps,)
        update = device.update(round_index=1, begun=begun)
        np.testing.assert_array_equal(update.params, whole_update.params)
        np.testing.assert_array_equal(update.state.local, whole_update.state.local)
        assert (update.loss, update.num_steps) == (whole_update.loss, whole_update.num_steps)
        assert update.state.steps_taken == whole_update.state.steps_taken == 12
        assert (update.state.moments is None) == (whole_update.state.moments is None)
        for name, moment in (whole_update.state.moments or {}).items():
            np.testing.assert_array_equal(update.state.moments[name], moment)


def test_an_unfinished_update_is_not_changed_by_going_on_from_it(folder, backbone):
    device = Device(folder, backbone)
    begun = device.update(beat=halt_before(4)[0])
    assert begun.moments["prompts.step"] == len(begun.losses) == 3
    first, second = device.update(begun=begun), device.update(begun=begun)
    np.testing.assert_array_equal(first.params, second.params)


SHARDS = {4: OURS, 9: np.array([2, 8, 6]), 1: np.array([0]), 7: np.array([4, 9, 0, 10, 2, 6, 1]), 3: np.array([5, 9])}
PACKED = {
    "linear head": {"tuning": {"head": "linear"}},
    "dropout": {"tuning": {"dropout": 0.5}},
    "dropout of LoRA": {
        "tuning": {"kind": "lora", "targets": "all-linear", "dropout": 0.5},
        "learning_rate": 0.002,
    },
    "most steps": {"max_steps": 3},
    "moments kept, weight decay": {"reset_moments": False, "weight_decay": 0.1, "max_grad_norm": 0.02},
}


def trained(device, *, begun=None, stop=None):
    """Updates of all devices of SHARDS that are not done, from states of their own."""
    begun = begun or {}
    assignments = [
        Assignment(
            device=number,
            state=replace(device.state, local=device.state.local * np.float32(1 + number)),
            examples=examples,
            begun=begun.get(number),
        )
        for number, examples in SHARDS.items()
        if not isinstance(begun.get(number), DeviceUpdate)
    ]
    return {**begun, **device.updates(assignments, round_index=3, beat=halt_before(stop)[0])}


def keep_precision(device, dtype, monkeypatch):
    """Train in this precision and upload all trainable tensors in it."""
    as_float32 = local_update.as_parameters

    def in_precision(*arguments):
        return {name: p.detach().to(dtype).requires_grad_() for name, p in as_float32(*arguments).items()}

    monkeypatch.setattr(local_update, "as_parameters", in_precision)
    monkeypatch.setattr(
        device.tuning,
        "split",
        lambda tensors, layers, out: (np.concatenate([t.ravel() for t in tensors.values()]), None),
    )


@pytest.mark.parametrize("setting", PACKED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_devices_side_by_side_are_trained_as_one_by_one(folder, monkeypatch, setting, dtype, tolerance):
    options = PACKED[setting]
    backbone = load_backbone(folder, "llama-gqa", head=options.get("tuning", {}).get("head", "verbalizer"))
    backbone.model.to(dtype)
    devices = [Device(folder, backbone, pack=pack, **options) for pack in (1, 2, 3, 8)]
    for device in devices:
        keep_precision(device, dtype, monkeypatch)
    alone, *packed = map(trained, devices)
    for updates in packed:
        assert sorted(updates) == sorted(SHARDS)
        for number, update in updates.items():
            expected = alone[number]
            np.testing.assert_allclose(update.params, expected.params, rtol=0, atol=tolerance)
            assert update.loss == pytest.approx(expected.loss, rel=tolerance)
            steps = 2 * -(-len(SHARDS[number]) // 2)
            assert update.num_steps == expected.num_steps == min(steps, options.get("max_steps", steps))


def test_a_device_that_is_done_makes_room_for_the_next(folder, backbone):
    beat, said = halt_before(None)
    device = Device(folder, backbone, pack=2, epochs=1)
    assignments = [Assignment(device=n, state=device.state, examples=x) for n, x in SHARDS.items()]
    assert list(device.updates(assignments, beat=beat)) == [9, 4, 1, 3, 7]
    assert [[int(n) for n in re.findall(r"device (\d+)", words)] for words in said] == [
        [4, 9], [4, 9], [4, 1], [7, 3], [7], [7], [7]
    ]  # fmt: skip


@pytest.mark.parametrize("setting", PACKED)
def test_a_pack_that_was_stopped_goes_on_to_the_same_bits(folder, setting):
    options = PACKED[setting]
    backbone = load_backbone(folder, "llama-gqa", head=options.get("tuning", {}).get("head", "verbalizer"))
    device = Device(folder, backbone, pack=3, **options)
    whole_updates = trained(device)
    for stops in ([2], [6], [3, 4], [2, 1, 5, 2]):
        begun = {}
        for stop in stops:
            torch.rand(3)
            begun = trained(device, begun=begun, stop=stop)
        updates = trained(device, begun=begun)
        for number, update in whole_updates.items():
            np.testing.assert_array_equal(updates[number].params, update.params)
            np.testing.assert_array_equal(updates[number].state.local, update.state.local)
            assert updates[number].loss == update.loss


@pytest.mark.parametrize("kind", ["prompt", "lora", "adapter", "full"])
def test_frozen_layers_stay_and_the_others_step_as_they_would(folder, kind):
    """Plain SGD, norms not clipped: one layer's step depends on no other layer's."""
    backbone = load_backbone(folder, "llama-gqa", kind=kind)
    keys = {"optimizer": "sgd", "epochs": 1, "batch_size": 5, "max_grad_norm": 1e9, "weight_decay": 0.1}
    trained, frozen = (Device(folder, backbone, tuning={"kind": kind}, **keys) for _ in range(2))
    frozen.tuning.frozen = frozen.tuning.other_layers(LAYERS)
    expected, found = trained.update(), frozen.update()
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-6, atol=1e-9)
    assert np.array_equal(found.state.local, frozen.state.local)
    assert not np.array_equal(expected.state.local, trained.state.local)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_the_backward_pass_ends_at_the_lowest_layer_that_is_trained(folder, kind):
    backbone = load_backbone(folder, "llama-gqa", kind=kind)
    device, seen = Device(folder, backbone, layers=(2,), tuning={"kind": kind}), []
    for layer in backbone._layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    device.tuning.frozen = (0, 1)
    device.update()
    assert seen[:3] == [False, False, True]
