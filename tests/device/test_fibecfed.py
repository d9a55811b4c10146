"""FibecFed's parts: curriculum by Fisher information, layers by sensitivity, sparse local update."""

from itertools import combinations

import numpy as np
import pytest
import torch
from backbones import NUM_LAYERS, load_backbone, load_plain, make_batch, save_backbone
from test_local_update import OURS, Device, make_split
from tiny import metrics

from fedhpc.config.file import load_config
from fedhpc.device.curriculum import easy_first, fisher_trace, fisher_traces
from fedhpc.device.local_update import local_updates
from fedhpc.model.backbone import Backbone
from fedhpc.selection.strategies.sensitivity import PERTURBATION, layer_sensitivity
from fedhpc.server.job import load_job
from fedhpc.tuning.base import as_parameters

LORA = {"kind": "lora", "rank": 2}
LAYERS = (0, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("fibecfed"), "llama-gqa")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, "llama-gqa")


def squared_gradient(device, example):
    """Of one example's log-likelihood, summed over all parameters."""
    params = as_parameters(device.tensors, CPU)
    batch = make_split().batch([example])
    scores = device.tuning.forward(device.backbone, [params], batch)
    likelihood = torch.log_softmax(scores, dim=1)[0, batch.labels[0]]
    return sum(float(g.square().sum()) for g in torch.autograd.grad(likelihood, list(params.values())))


@pytest.mark.parametrize("tuning", [LORA, {"kind": "full"}])
def test_the_fisher_trace_is_the_mean_squared_gradient_of_single_examples(folder, backbone, tuning):
    device = Device(folder, backbone, tuning=tuning)
    examples = np.array([3, 8, 5])
    params = as_parameters(device.tensors, CPU)
    trace = fisher_trace(backbone, device.tuning, params, make_split(), examples)
    assert trace == pytest.approx(np.mean([squared_gradient(device, example) for example in examples]), rel=1e-4)


def test_batches_go_from_easy_to_hard(folder, backbone):
    device = Device(folder, backbone, tuning=LORA)
    given = np.split(np.arange(8), 4)
    seen = []
    found = fisher_traces(backbone, device.tuning, device.tensors, make_split(), given, seen.append)
    ordered = easy_first(given, found)
    traces = [np.mean([squared_gradient(device, example) for example in batch]) for batch in ordered]
    assert traces == sorted(traces)
    assert [batch.tolist() for batch in ordered] != [batch.tolist() for batch in given]
    assert len(seen) == 4  # a stop can come between two batches


def test_sensitivity_is_how_far_layers_follow_a_move_along_the_loss_gradient(folder, backbone):
    device, batch = Device(folder, backbone, tuning=LORA), make_batch("llama-gqa")
    found = layer_sensitivity(backbone, device.tuning, device.tensors, batch)
    plain = load_plain(folder, "llama-gqa", torch.float64)
    words = plain.get_input_embeddings()(batch.input_ids).detach().requires_grad_()

    def run(embeddings):
        return plain(inputs_embeds=embeddings, attention_mask=batch.attention_mask, output_hidden_states=True)

    in_text = batch.attention_mask[..., None]
    logits = run(words).logits[torch.arange(3), batch.slots][:, [7, 41, 90]]  # LoRA starts with no change
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch.labels), words)
    move = PERTURBATION * (words * in_text).norm() * gradient / gradient.norm()
    # The last hidden state of transformers is behind the final norm, so the comparison ends a layer before.
    states = [run(embeddings).hidden_states[1:NUM_LAYERS] for embeddings in (words, words + move)]
    expected = [((b - a) * in_text).norm() / (a * in_text).norm() for a, b in zip(*states, strict=True)]
    np.testing.assert_allclose(found[: NUM_LAYERS - 1], torch.stack(expected).detach(), rtol=1e-3)


def test_sensitivity_without_a_loss_gradient_is_an_error(folder, backbone):
    device, batch = Device(folder, backbone, tuning=LORA), make_batch("llama-gqa")
    tuning = device.tuning
    tuning.losses = lambda scores, labels: 0 * scores.sum(1)
    with pytest.raises(FloatingPointError, match="cannot rank the layers"):
        layer_sensitivity(backbone, tuning, device.tensors, batch)


def test_after_its_first_round_a_device_trains_its_most_informative_rows_only(folder, backbone):
    settings = {"sparse": {"fraction": 0.25}, "weight_decay": 0.1}
    device = Device(folder, backbone, layers=LAYERS, tuning=LORA, **settings)
    first = device.update()
    assert rows_that_moved(device, device.state.local, first.state.local).all()
    device.state = first.state
    second = device.update(round_index=1)
    moved = rows_that_moved(device, first.state.local, second.state.local)
    assert moved.sum() == np.ceil(0.25 * moved.size)
    information = np.concatenate(
        [view.sum(-1).ravel() for view in device.tuning.local(LAYERS).views(first.state.fisher).values()]
    )
    assert information[moved].min() >= information[~moved].max()
    assert (second.params != first.params).mean() > 0.9  # exchanged layers are trained whole
    np.testing.assert_array_equal(second.state.fisher, first.state.fisher)


def rows_that_moved(device, before, after):
    views = device.tuning.local(LAYERS).views(after - before)
    return np.concatenate([(view != 0).any(-1).ravel() for view in views.values()])


def test_the_information_is_the_running_mean_of_squared_gradients(folder, backbone):
    """One batch: momentum 0.75 leaves a quarter of the squared gradient at the start."""
    sparse = {"fraction": 0.5, "momentum": 0.75}
    device = Device(folder, backbone, layers=LAYERS, tuning=LORA, sparse=sparse, epochs=1, batch_size=4)
    update = device.update(examples=OURS[:4])
    params, batch = as_parameters(device.tensors, CPU), make_split().batch(OURS[:4])
    loss = device.tuning.losses(device.tuning.forward(backbone, [params], batch), batch.labels).mean()
    gradients = torch.autograd.grad(loss, list(params.values()))
    squares = {name: 0.25 * g.square().numpy() for name, g in zip(params, gradients, strict=True)}
    expected = device.tuning.split(squares, LAYERS)[1]
    np.testing.assert_allclose(update.state.fisher, expected, rtol=1e-3, atol=1e-6 * expected.max())


FIBECFED = {
    "tuning": {"kind": "lora", "rank": 2},
    "curriculum": {"order": "fisher", "start": 0.4, "end": 1.0},
    "selection": {"strategy": "sensitivity", "ratio": 0.5},
    "sparse": {"fraction": 0.5},
    "server": {"method": "fedavg"},
}


def test_a_device_trains_its_easiest_batches_first(run_config, fedhpc, monkeypatch):
    """The same batches in each round, by the Fisher information at the initial parameters, and ever more of them."""
    config = run_config(**FIBECFED, federation__rounds=2, federation__sample_rate=1.0)
    plans = {0: {}, 1: {}}

    def noting(*arguments, round_index, assignments, **named):
        plans[round_index] |= {each.device: [batch.tolist() for batch in each.plan] for each in assignments}
        return local_updates(*arguments, round_index=round_index, assignments=assignments, **named)

    monkeypatch.setattr("fedhpc.device.training.local_updates", noting)
    assert fedhpc("run", config)[0] == 0
    job = load_job(load_config(config))
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, CPU)
    initial = as_parameters(job.tuning.initial(job.config.seed), CPU)
    lengths = []
    for number, later in plans[1].items():
        first = plans[0][number]
        assert later[: len(first)] == first
        lengths.append((len(first), len(later)))
        traces = [
            fisher_trace(backbone, job.tuning, initial, job.data.split("train"), np.array(batch)) for batch in later
        ]
        assert traces == sorted(traces)
    assert any(few < many for few, many in lengths)


def test_few_steps_are_easy_to_hard_and_not_always_the_easiest(run_config, fedhpc, monkeypatch):
    curriculum = {"order": "fisher", "start": 1.0}
    federation = {"num_devices": 4, "sample_rate": 1.0, "rounds": 8}  # 20 batches a device, more or less
    device = {"epochs": 1, "batch_size": 3, "max_steps": 4}
    seen = []

    def noting(*arguments, assignments, **named):
        for each in assignments:
            if each.device == 1:
                seen.append([tuple(batch) for batch in each.plan])
        return local_updates(*arguments, assignments=assignments, **named)

    monkeypatch.setattr("fedhpc.device.training.local_updates", noting)
    config = run_config(tuning={"kind": "lora"}, curriculum=curriculum, federation=federation, device=device)
    assert fedhpc("run", config)[0] == 0
    assert [len(plan) for plan in seen] == [4] * 8
    assert metrics(config)[0]["device_steps"] == [4] * 4
    assert metrics(config)[0]["steps"] == 16
    assert len({batch for plan in seen for batch in plan}) > 8
    before = {pair for plan in seen for pair in combinations(plan, 2)}
    assert not before & {(other, one) for one, other in before}  # of two batches, one is the easier in every round


def test_a_run_takes_fewer_steps_at_first(run_config, fedhpc):
    config = run_config(**FIBECFED, federation__rounds=4, federation__sample_rate=1.0)
    assert fedhpc("run", config)[0] == 0
    steps = [record["steps"] for record in metrics(config)]
    assert steps == sorted(steps)
    assert steps[0] < 0.7 * steps[-1]
