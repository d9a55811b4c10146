"""How many bytes of tensors a rank holds at once: its work, rehearsed on tensors that have shapes but no numbers.

What runs is the code of a run, on PyTorch's fake tensors (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html):
every operation says which tensors it would make, and nothing is computed. So the count knows the architecture, tuning,
attention kernel, recomputation and pack as the run does. It is that of a CPU.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin

from fedhpc.config.sections import ModelConfig, TuningConfig
from fedhpc.data.prepared import Batch, Description, Split
from fedhpc.device.curriculum import fisher_trace
from fedhpc.device.local_update import pack_gradients
from fedhpc.evaluate.predictions import results
from fedhpc.evaluate.questions import answer_tokens, question_split
from fedhpc.model.attention import forget_masks
from fedhpc.model.backbone import Backbone
from fedhpc.model.decoding import Decoding
from fedhpc.model.last_layer import LastLayer
from fedhpc.model.numbers import NOT_TAKEN
from fedhpc.model.overlay import Overlay
from fedhpc.model.prepacking import prepacked_bytes
from fedhpc.model.pretrained import auto_class, run_config
from fedhpc.model.quantization import saved_bytes
from fedhpc.selection import make_strategy
from fedhpc.selection.spectrum import BatchLoss
from fedhpc.server.job import Job
from fedhpc.tuning.base import Params

CPU = torch.device("cpu")
MISLED = [logging.getLogger(module.__module__) for module in (FakeTensorMode, GenerationMixin)]
"""Logs of what would be wrong with real tensors."""


class LiveBytes(TorchDispatchMode):
    """Counts, in this context, the bytes of the tensors that operations make, as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.answer = False
        """The answer to every question that only a number could decide."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], torch._subclasses.FakeTensor):
            return self.answer
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes

    def during(self, work: Callable[[], object]) -> int:
        """Most bytes that were held at once during some work, beyond those before it."""
        before = self.most = self.now
        work()
        return self.most - before


class Outline(Backbone):
    """A backbone whose weights have no numbers; what checks find by numbers is taken to be so."""

    def _load(self, config: ModelConfig, data: Description, torch_device: torch.device) -> Any:
        loader, dtype = auto_class(head=data.head, kind=data.kind), getattr(torch, config.dtype)
        model = loader.from_config(run_config(config), dtype=dtype, attn_implementation="sdpa")
        self.loaded_bytes = sum({p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}.values())
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def _check(self, config: ModelConfig, tuning: TuningConfig, *, longest: int) -> None:
        self._choose_rows(config, tuning, longest)
        if self._head is None:
            return
        if not self.answers.needs_vocabulary:
            self._head.keep(self.answers.first_tokens)
        if config.attention == "sdpa" and self._layers and not self.generates:
            self._last_layer = LastLayer(self._layers[-1])
            try:
                self._at_slots(self.probe(), Overlay())
            except NOT_TAKEN:
                self._last_layer.restore()
                self._last_layer = None

    def _same(self, ours: torch.Tensor, theirs: torch.Tensor, *, size: torch.Tensor | None = None) -> bool:
        return True


class Rehearsal:
    """What a rank of a job does, each as the most bytes of tensors that it takes beside the backbone's weights.

    Batches are the largest that the job can have: the longest texts of a device.
    """

    def __init__(self, job: Job, live: LiveBytes) -> None:
        self._job, self._live = job, live
        self._backbone = Outline(job.config.model, job.config.tuning, job.data.description, CPU)
        self._train, self._validation = job.data.split("train"), job.data.split("validation")
        self.loading = self._backbone.loaded_bytes
        """Bytes of the weights with the whole language-model head, in the type of a run."""
        self.weights: float = live.now
        """Bytes of the weights that stay."""
        if (kind := job.config.model.quantization) is not None:
            self.weights -= saved_bytes(self._backbone, kind)
        self.prepacked = prepacked_bytes(self._backbone.base) if job.config.model.prepack_weights else 0
        """Bytes of the same weights as they are prepacked."""

    def training(self, pack: int, waiting: int) -> int:
        """A step of so many devices, when others wait for their place in the pack, prompts and moments ready."""
        tuning, config = self._job.tuning, self._job.config
        chosen = self._batches(config.device.batch_size)[:pack]
        batch = self._train.batch(np.concatenate(chosen), [len(examples) for examples in chosen])
        seeds = range(len(chosen)) if config.tuning.draws else None

        def step() -> None:
            lanes = [self._parameters() for _ in range(max(len(chosen), waiting))]
            moments = [torch.zeros_like(p) for own in lanes for p in own.values() for _ in range(2)]
            self._backbone.training_mode(True)
            pack_gradients(self._backbone, tuning, lanes[: len(chosen)], batch, seeds)
            del moments

        return self._live.during(step)

    def evaluation(self, count: int) -> int:
        """The batch with the longest texts, of so many devices."""
        split = self._validation
        examples = longest(split, np.arange(len(split)), self._job.config.evaluate.batch_size)

        return self._computing(self._outcome, split, examples, count)

    def _computing(
        self, of_batch: Callable[[Sequence[Params], Batch], object], split: Split, examples: np.ndarray, count: int
    ) -> int:
        """What comes of a batch of these examples, of so many devices."""

        def compute() -> None:
            batch = [(self._parameters(), part) for part in np.array_split(examples, count)]
            for _ in results(of_batch, self._backbone, split, [batch]):
                pass

        return self._live.during(compute)

    def _outcome(self, params: Sequence[Params], batch: Batch) -> object:
        backbone, tuning = self._backbone, self._job.tuning
        if backbone.generates:
            return backbone.token_scores(batch, tuning.overlay(backbone, params, batch, None))
        return tuning.forward(backbone, params, batch)

    def answers(self, count: int) -> int:
        """The longest prompts with their answers in the cache, of so many devices: one pass, as if all were prompt."""
        config, prompts = self._job.config.evaluate, self._job.questions.prompts
        lengths = np.sort(prompts.lengths)[-config.batch_size :] + config.max_new_tokens
        texts = [np.zeros(length, np.int32) for length in lengths]
        whole = question_split(texts, [np.zeros(0, np.int64)] * len(texts), pad_id=prompts.pad_id)
        how = Decoding(max_new_tokens=1, temperature=0.0, top_p=1.0, ends=(), pad_id=prompts.pad_id, seed=0)
        answer = partial(answer_tokens, self._backbone, self._job.tuning, how, range(len(texts)))
        self._live.answer = True  # all answers have ended
        found = self._computing(answer, whole, np.arange(len(texts)), count)
        self._live.answer = False
        return found

    def scoring(self) -> int:
        """The layers' scores by one batch; some need its gradient."""
        strategy = make_strategy(self._job.config.selection)
        batch = self._batch(strategy.config.batch_size)
        if strategy.with_gradients:
            self._live.answer = True  # its numbers are finite
            self._backbone.training_mode(True, dropout=False)
            tensors = self._tensors()
            found = self._live.during(lambda: strategy.score_layers(self._backbone, self._job.tuning, tensors, batch))
            self._live.answer = False
            return found
        # Similarities are computed in float64, from a float32 copy.
        copies = (4 + 2 * 8) * batch.input_ids.numel() * self._job.shape.hidden_size
        return self._live.during(lambda: self._backbone.layer_outputs(batch)) + copies

    def curriculum(self) -> int:
        """How hard a batch is."""
        (examples, *_), tuning = self._batches(self._job.config.device.batch_size), self._job.tuning
        self._backbone.training_mode(True, dropout=False)
        return self._live.during(
            lambda: fisher_trace(self._backbone, tuning, self._parameters(), self._train, examples)
        )

    def hessian(self) -> int:
        """Products with the Hessian of one batch's loss; `eigengap` compares it with that at another place."""
        batch, tensors = self._batch(self._job.config.device.batch_size), self._tensors()
        self._backbone.training_mode(False)

        def products() -> None:
            loss = BatchLoss(self._backbone, self._job.tuning, tensors, batch, lambda: None)
            graphs = [
                loss.gradients_at(loss.moved) for _ in range(1 + (self._job.config.selection.auto_by == "eigengap"))
            ]
            product = torch.stack([gradient.sum() for gradient in graphs[-1]]).sum()
            self._backbone.gradients(product, loss.moved, retain_graph=True)

        return self._live.during(products)

    def _batches(self, size: int) -> list[NDArray[np.int64]]:
        """Every device's longest texts, so many; the devices that take most first."""
        lengths = self._train.lengths
        batches = [longest(self._train, examples, size) for examples in self._job.partition.train if len(examples)]
        return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])

    def _batch(self, size: int) -> Batch:
        return self._train.batch(self._batches(size)[0])

    def _tensors(self) -> dict[str, np.ndarray]:
        """Trainable tensors of zeros, which take no memory until they are written to."""
        return {name: np.zeros(shape, np.float32) for name, shape in self._job.tuning.shapes.items()}

    def _parameters(self) -> dict[str, torch.Tensor]:
        shapes = self._job.tuning.shapes
        return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def longest(split: Split, examples: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """So many of the examples, those with most tokens first."""
    chosen = np.asarray(examples)
    return chosen[np.argsort(-split.lengths[chosen], kind="stable")][:count]


@contextmanager
def rehearsal(job: Job) -> Iterator[Rehearsal]:
    """A rehearsal of a job; in this context tensors have no numbers."""
    for log in MISLED:
        log.disabled = True
    try:
        with FakeTensorMode(), LiveBytes() as live:
            yield Rehearsal(job, live)
    finally:
        for log in MISLED:
            log.disabled = False
        forget_masks()
