"""What an evaluation finds of each example, how the ranks' parts of it add up, and the scores that follow.

All sums are of whole numbers: the same in any order, on any number of ranks.

Shapes: n examples of the split, b of a batch, N devices, C classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.data.prepared import Batch, Description, Split
from fedhpc.evaluate.metrics import confusion, ratio, score
from fedhpc.evaluate.scores import ACCURACY, HELD_OUT, OF_TOKENS, Score
from fedhpc.federation.sampling import held_out_devices
from fedhpc.job.run_files import LARGEST_NUMBER
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params

ELSEWHERE = -1
"""In place of an example's outcome: another rank evaluates it."""
LOSS_UNIT = 2.0**-24
"""Losses of examples are counted in it, in nats."""

Outcome = NDArray[np.int64]
"""[n, k], of each example; all ELSEWHERE where it was not evaluated here."""


class Outcomes(ABC):
    """One kind of task's.

    Args:
        description: of the prepared data.
        num_devices: N.
        held_out: the devices that never train.
    """

    numbers: int
    """k, of an example."""
    shown: ClassVar[Sequence[Score]]
    """The scores that a run shows while it goes on."""

    def __init__(self, description: Description, num_devices: int, held_out: Sequence[int] = ()) -> None:
        self.description, self.num_devices, self.held_out = description, num_devices, list(held_out)

    @abstractmethod
    def of_batch(self, backbone: Backbone, tuning: Tuning, params: Sequence[Params], batch: Batch) -> Outcome:
        """Of a batch's examples [b, k], without gradients; arguments as those of `Tuning.forward`."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """A rank's part of the sums."""

    @abstractmethod
    def fill(self, part: Any, personal: Outcome, shared: Outcome, split: Split, of_device: Sequence[NDArray]) -> None:
        """Fill in a rank's part, one element of ``dtype``.

        Args:
            personal: with each device's own tensors.
            shared: with the server's.
            of_device: examples of each device.
        """

    @abstractmethod
    def scores(self, parts: np.ndarray) -> dict[str, Any]:
        """Of a round's metrics, from all ranks' parts: personalised, with ``_global`` behind the server's, with
        ``_held_out`` the server's for the devices that never train.

        None where no example was evaluated, but the accuracy of devices that train: without one, a round would count as
        not evaluated.
        """


class Classes(Outcomes):
    """Of classification: the class that is predicted."""

    numbers = 1
    shown = (ACCURACY,)

    def of_batch(self, backbone: Backbone, tuning: Tuning, params: Sequence[Params], batch: Batch) -> Outcome:
        """See `Outcomes`."""
        return tuning.forward(backbone, params, batch).argmax(1, keepdim=True).cpu().numpy()

    @property
    def dtype(self) -> np.dtype:
        """See `Outcomes`; confusion matrices: rows true, columns predicted."""
        matrix = (len(self.description.class_names),) * 2
        each = (self.num_devices,)
        matrices = [("personal", "<i8", matrix), ("global", "<i8", matrix)]
        if self.held_out:
            matrices.append(("held_out", "<i8", matrix))
        return np.dtype([*matrices, ("correct", "<i4", each), ("evaluated", "<i4", each)])

    def fill(self, part: Any, personal: Outcome, shared: Outcome, split: Split, of_device: Sequence[NDArray]) -> None:
        """See `Outcomes`."""
        own, apart = personal[:, 0], np.zeros(len(split), bool)
        for device in self.held_out:
            apart[of_device[device]] = True
        counted = {"personal": (own, ~apart), "global": (shared[:, 0], ~apart), "held_out": (shared[:, 0], apart)}
        for name in counted.keys() & part.dtype.names:
            found, wanted = counted[name]
            here = wanted & (found != ELSEWHERE)
            part[name] = confusion(split.labels[here], found[here], len(self.description.class_names))
        for name, counts in (("correct", own == split.labels), ("evaluated", own != ELSEWHERE)):
            part[name] = [np.count_nonzero(counts[examples]) for examples in of_device]

    def scores(self, parts: np.ndarray) -> dict[str, Any]:
        """See `Outcomes`."""
        found: dict[str, Any] = {}
        for name, behind in (("personal", ""), ("global", "_global"), ("held_out", "_held_out")):
            if name in (parts.dtype.names or ()):
                counts = parts[name].sum(axis=0)
                for metric, value in score(counts, self.description.metric).items():
                    found[f"{metric}{behind}"] = None if name == "held_out" and not counts.any() else value
        correct, evaluated = (parts[name].sum(axis=0).tolist() for name in ("correct", "evaluated"))
        devices = [round(right / size, 6) if size else None for right, size in zip(correct, evaluated, strict=True)]
        return {
            **found,
            "device_accuracy": devices,
            "evaluated": sum(evaluated),
        }


class Tokens(Outcomes):
    """Of texts to be generated: the loss over an example's trained tokens, and how many the model finds likeliest."""

    numbers = 2
    shown = OF_TOKENS

    def of_batch(self, backbone: Backbone, tuning: Tuning, params: Sequence[Params], batch: Batch) -> Outcome:
        """See `Outcomes`."""
        assert batch.targets is not None
        losses, right = backbone.token_scores(batch, tuning.overlay(backbone, params, batch, None))
        each = torch.stack([losses.double(), right.double()], dim=1).cpu().numpy()
        starts = np.searchsorted(batch.targets.texts.cpu().numpy(), np.arange(len(batch.lengths)))
        return np.rint(np.add.reduceat(each, starts) / [LOSS_UNIT, 1.0]).astype(np.int64)

    @property
    def dtype(self) -> np.dtype:
        """See `Outcomes`; sums over each device's tokens."""
        names = ("loss", "right", "loss_global", "right_global", "tokens", "evaluated")
        return np.dtype([(name, "<i8", (self.num_devices,)) for name in names])

    def fill(self, part: Any, personal: Outcome, shared: Outcome, split: Split, of_device: Sequence[NDArray]) -> None:
        """See `Outcomes`."""
        for behind, found in (("", personal), ("_global", shared)):
            here = (found[:, 0] != ELSEWHERE)[:, None]
            counted = np.where(here, found, 0)
            for name, column in (("loss", counted[:, 0]), ("right", counted[:, 1])):
                part[f"{name}{behind}"] = [column[examples].sum() for examples in of_device]
        here = personal[:, 0] != ELSEWHERE
        for name, counts in (("tokens", split.num_terms * here), ("evaluated", here)):
            part[name] = [counts[examples].sum() for examples in of_device]

    def scores(self, parts: np.ndarray) -> dict[str, Any]:
        """See `Outcomes`; `accuracy` is that of tokens."""
        sums = {name: parts[name].sum(axis=0) for name in parts.dtype.names or ()}
        training = np.setdiff1d(np.arange(self.num_devices), self.held_out)
        found: dict[str, Any] = {}
        for behind, of, devices in (
            ("", "", training),
            ("_global", "_global", training),
            *([(HELD_OUT, "_global", self.held_out)] if self.held_out else []),
        ):
            tokens = sums["tokens"][devices].sum()
            right, loss = (sums[f"{name}{of}"][devices].sum() for name in ("right", "loss"))
            found[f"accuracy{behind}"] = ratio(right, tokens) if tokens or behind != HELD_OUT else None
            found[f"perplexity{behind}"] = perplexity(loss, tokens) if tokens else None
        pairs = list(zip(sums["right"].tolist(), sums["tokens"].tolist(), strict=True))
        return {
            **found,
            "device_accuracy": [round(right / size, 6) if size else None for right, size in pairs],
            "evaluated": int(sums["evaluated"].sum()),
        }


def perplexity(loss: int, tokens: int) -> float:
    """exp of the mean loss of a token.

    Args:
        loss: sum over the tokens, in LOSS_UNIT.
        tokens: how many.
    """
    return min(math.exp(min(ratio(loss * LOSS_UNIT, tokens), 700.0)), LARGEST_NUMBER)


def make_outcomes(description: Description, config: Config) -> Outcomes:
    """Those of a run on a prepared data set."""
    kind = Tokens if description.head == "language_model" else Classes
    return kind(description, config.federation.num_devices, held_out_devices(config))
