"""What every server method shares."""

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import MethodConfig, Part, PositiveFloat, Probability
from fedhpc.errors import ConfigError
from fedhpc.methods.adding import add_up
from fedhpc.methods.updates import Layout, RoundUploads, Sums, Vector

STEP_BLOCK = 1 << 17
"""Elements of a step that a processor's caches hold with what is computed from them."""


@dataclass(frozen=True, kw_only=True)
class Population:
    """What a method may know of the federation."""

    num_devices: int
    """That can train."""
    sample_rate: float
    total_count: int
    """What all their uploads count together (`server.weights`)."""


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that the server carries from one round to the next; data, no behaviour.

    Vectors have shape [n], the layout of the exchanged tensors.
    """

    round: int
    """Rounds completed, t."""
    params: Vector
    """P^t."""
    vectors: dict[str, Vector] = field(default_factory=dict)
    """The method's own vectors by name, for example momentum."""
    control: dict[int, Vector] = field(default_factory=dict)
    """c_i of the devices seen so far; a device never seen has c_i = 0 and no entry."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The method's own numbers by name, for example a decaying server learning rate."""

    def restrict(self, kept: NDArray[np.intp] | slice) -> "ServerState":
        """The state of the vector elements ``kept`` alone, when layers leave the exchange."""
        return self.each(lambda vector: vector[kept])

    def each(self, change: Callable[[Vector], Vector]) -> "ServerState":
        """The state with every vector changed in the same way."""
        return replace(
            self,
            params=change(self.params),
            vectors={name: change(vector) for name, vector in self.vectors.items()},
            control={device: change(vector) for device, vector in self.control.items()},
        )

    def all_vectors(self) -> Iterator[Vector]:
        """Every vector, in a fixed order."""
        yield self.params
        yield from self.vectors.values()
        yield from self.control.values()


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """How a method changes the devices' steps, on the exchanged parameters; vectors [n].

    A step goes along optimizer(scale clip(g + mu (P - P^t)) + shift) + step_shift.
    """

    gradient_scale: float = 1.0
    gradient_shift: Vector | None = None
    proximal: float = 0.0
    """mu."""
    step_shift: Vector | None = None


UNCHANGED = LocalRule()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))


class ReusedMemory:
    """Matrices in memory that a process has had before, whose pages the system need not find and clear again."""

    def __init__(self) -> None:
        self._given: deque[NDArray[np.float32]] = deque(maxlen=2)
        """The latest ones: of one round and of the round before."""

    def empty(self, rows: int, columns: int) -> NDArray[np.float32]:
        """A matrix of any content, which nobody else has or sees a part of."""
        given, self._given = self._given, deque(maxlen=2)
        found, unshared = None, object()
        while given:
            matrix = given.popleft()
            if sys.getrefcount(matrix) > sys.getrefcount(unshared):  # every view of a matrix refers to it
                self._given.append(matrix)
            elif matrix.shape == (rows, columns):
                found = matrix
        self._given.append(np.empty((rows, columns), np.float32) if found is None else found)
        return self._given[-1]


class MomentumConfig(MethodConfig):
    """Of methods with a first moment."""

    learning_rate: PositiveFloat = 1.0
    """eta_s."""
    momentum: Probability = 0.9
    """beta, of the first moment."""


class Method(Part, ABC):
    """One way to turn a round's uploads into the next global parameters.

    Sums run in a fixed order in float64 and are stored as float32, so that the result does not depend on how many
    ranks took part.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    sends: tuple[str, ...] = ()
    """Vectors of the state that devices receive with P^t."""
    keeps: tuple[str, ...] = ()
    """Vectors that a device keeps between its rounds."""
    uploads_gradient = False
    """Whether devices upload, beside P_i, the gradient of their whole shard at P^t."""
    has_control = False
    """Whether there is a control variate for each device; of a SummedMethod, `change` renews it."""
    has_personal = False
    """Whether devices train, beside P_i, parameters of their own from round to round, by `personal_rule`."""
    adds_weights = False
    """Whether its rounds also change the frozen weights, see `added`."""
    if_it_diverges = " or device.learning_rate"
    """Ends the advice to lower server.learning_rate."""
    layout = Layout({})
    """Names and shapes of the exchanged tensors in a vector [n]; known once layers are selected."""

    def __init__(self, config: Any, population: Population) -> None:
        self.config = config
        self.num_devices, self.sample_rate = population.num_devices, population.sample_rate
        self.total_count = population.total_count
        self._control_memory, self._other_memory = ReusedMemory(), ReusedMemory()

    @classmethod
    def make(cls, config: MethodConfig, population: Population) -> "Method":
        """The method for a run, from its Config."""
        return cls(config, population)

    @classmethod
    def check(cls, config: Any) -> None:
        """See `fedhpc.config.sections.Part.check`; a method that needs each upload by itself cannot have sums alone."""
        if config.exchange.sums_only and not cls.works_with_sums(config.server):
            raise ConfigError(
                f"server.method: {cls.label(config.server)} needs each upload by itself; it needs exchange.mode: gather"
            )

    @classmethod
    def works_with_sums(cls, config: Any) -> bool:
        """Whether it needs no more of the uploads than a `SummedMethod` (`exchange.mode: reduce`, `secure`)."""
        return issubclass(cls, SummedMethod)

    @classmethod
    def label(cls, config: Any) -> str:
        """What the method is called in messages and reports."""
        return str(config.method)

    def server_learning_rate(self, state: ServerState) -> float | None:
        """eta_s of the round that led to a state; None where the method has none."""
        rate: float | None = getattr(self.config, "learning_rate", None)
        return rate

    @classmethod
    def concurrency(cls, config: Any) -> int:
        """Devices at work at any time where the server waits for none of them (`RoundUploads.arrivals`); 0: it waits.

        Args:
            config: the whole `Config`.
        """
        return 0

    @property
    def num_uploaded(self) -> int:
        """Vectors in a device's upload."""
        return 2 if self.uploads_gradient else 1

    @property
    def usual_growth(self) -> float:
        """How many times as long as round 0's the server's updates may become although the devices' stay alike."""
        return 1.0

    def added(self, uploads: RoundUploads) -> list[Vector]:
        """Vectors [n] whose factors' products B A are added to the frozen weights of every rank after the round."""
        return []

    def local_rule(self, sent: Mapping[str, Vector], kept: Mapping[str, Vector]) -> LocalRule:
        """How a device steps, from what it was sent and what it has kept."""
        return UNCHANGED

    def personal_rule(self) -> LocalRule:
        """How a device steps with the parameters of its own."""
        return UNCHANGED

    def kept_after(
        self,
        start: Vector,
        params: Vector,
        sent: Mapping[str, Vector],
        kept: Mapping[str, Vector],
        *,
        num_steps: int,
        learning_rate: float,
    ) -> dict[str, Vector]:
        """What a device keeps after an update from P^t to P_i."""
        return {}

    @abstractmethod
    def init(self, params: Vector) -> ServerState:
        """The state before round 0."""

    def update(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """The state after one round. Pure: the given state stays as it is.

        The vectors are processed in blocks that stay in a processor's cache, on all processors that we may use.
        """
        size = state.params.size
        outline = self._step_of(slice(0), state, uploads)
        self._check_step(outline)
        # Control variates in one piece of memory: the system hands it out in pages of 2 MB, not 4 kB. The other vectors
        # in another, which does not stay when those have gone to disk.
        num_control = len(outline.control)
        num_others = len(list(outline.all_vectors())) - num_control
        rows = chain(self._other_memory.empty(num_others, size), self._control_memory.empty(num_control, size))
        new = outline.each(lambda _: next(rows))
        uploads = replace(uploads, control_memory=[new.control[device] for device in sorted(new.control)])

        def fill(first: int) -> None:
            block = slice(first, first + STEP_BLOCK)
            part = self._step_of(block, state, uploads)
            for target, source in zip(new.all_vectors(), part.all_vectors(), strict=True):
                if source.shape != target[block].shape:
                    self._refuse(f"made vectors of shape {source.shape} of {target[block].size} elements")
                if not np.may_share_memory(source, target):
                    target[block] = source

        list(_threads().map(fill, range(0, size, STEP_BLOCK)))
        return replace(new, control={**state.control, **new.control})

    def _check_step(self, state: Any) -> None:
        if not isinstance(state, ServerState):
            self._refuse(f"gave {type(state).__name__}, not a ServerState")
        for name, vector in {"params": state.params, **state.vectors}.items():
            if not isinstance(vector, np.ndarray) or vector.dtype != np.float32:
                self._refuse(f"made {name} of {getattr(vector, 'dtype', type(vector).__name__)}; vectors are float32")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"server.method: {self.config.method}: a step of {type(self).__qualname__} {what}")

    def _step_of(self, block: slice, state: ServerState, uploads: RoundUploads) -> ServerState:
        return self.step(state.restrict(block), uploads.block(block))

    @abstractmethod
    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """One round for some elements of the vectors; each element's result depends on that element alone."""


class SummedMethod(Method):
    """A method that needs of the uploads no more than sums of one vector a device, whoever adds them up."""

    needs_total = False
    """Whether `apply` reads the unweighted sum too."""

    def origin(self, start: Vector) -> Vector:
        """From where `change` is measured, [n]: it adds this where a device has found nothing new; see `privacy`.

        Args:
            start: P^t.
        """
        return np.zeros_like(start)

    @abstractmethod
    def change(
        self,
        start: Vector,
        params: Vector,
        control: Vector | np.float32,
        *,
        num_steps: int,
        learning_rate: float,
        memory: Vector | None = None,
    ) -> tuple[Vector, Vector | None]:
        """A device's own vector [n] of the sums, and its new c_i.

        Args:
            start: P^t.
            params: P_i.
            control: c_i before the round.
            num_steps: K_i.
            learning_rate: eta.
            memory: where the new c_i may be written.
        """

    @abstractmethod
    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """The next state but for its round and control variates, from the sums of the changes."""

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """One round; sums run in the order of device ids unless they come with the uploads."""
        sums, control = (uploads.sums, {}) if uploads.sums else self._add_up(state, uploads.in_device_order())
        new = self.apply(state, sums, uploads)
        if not isinstance(new, ServerState):
            self._refuse(f"gave {type(new).__name__}, not a ServerState")
        return replace(new, round=state.round + 1, control=control)

    def _add_up(self, state: ServerState, uploads: RoundUploads) -> tuple[Sums, dict[int, Vector]]:
        control = {}

        def changes() -> Iterator[Vector]:
            for i, device in enumerate(uploads.device_ids.tolist()):
                change, new_control = self.change(
                    state.params,
                    uploads.params[i],
                    state.control.get(device, np.float32(0)),
                    num_steps=int(uploads.num_steps[i]),
                    learning_rate=uploads.device_learning_rate,
                    memory=uploads.control_memory[i] if uploads.control_memory else None,
                )
                if new_control is not None:
                    control[device] = new_control
                yield change

        return add_up(changes(), uploads.weights, state.params.size, with_total=self.needs_total), control


def built_up(momentum: float) -> float:
    """How many times as long as its first step momentum makes one, where it starts at zero and is not corrected."""
    return 1 / (1 - momentum)


def weighted_mean(uploads: RoundUploads) -> NDArray[np.float64]:
    """Pbar = sum_i w_i P_i in float64, in the order of the uploads; shape [n]."""
    return add_up(uploads.params, uploads.weights, uploads.params[0].size).mean


def f32(vector: NDArray[np.float64]) -> Vector:
    """Round to the stored precision."""
    return vector.astype(np.float32)
