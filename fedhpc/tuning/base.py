"""What every tuning shares: its tensors, and which of them are exchanged once layers are selected.

A tensor is either *per layer* (axis 0 counts the backbone's layers; the selected rows are exchanged, the others stay
on the device) or *shared* (exchanged whole, for example a linear head). Of either kind, some may stay on the device
whole: those that `exchange.keep` names, and those that are not trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from fedhpc.config.sections import Part, TuningConfig
from fedhpc.errors import ConfigError, ModelError
from fedhpc.job.deferred import Tensor, functional, torch
from fedhpc.methods.updates import Layout, Vector
from fedhpc.model.numbers import LOSS_SCALE, at_least_float32, no_surprise
from fedhpc.model.overlay import Edit, Overlay, SoftTokens, rows_of_devices  # noqa: F401 - tunings look for it here
from fedhpc.seeding import generator
from fedhpc.tuning.peft_form import PeftForm

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape

OTHER_KIND = "choose another tuning.kind (docs/configuration.md says which models take which)"
Params = Mapping[str, Tensor]
"""A device's trainable tensors by name."""
Rows = Mapping[str, Sequence[Tensor]]
"""Those with a row for each layer, by name; the layers' rows."""


class TokensConfig(TuningConfig):
    """Of tunings that put tokens before the text, in attention alone or wherever it passes."""

    num_tokens: Annotated[int, Field(gt=0, le=1 << 16)] = 20
    """Prompt tokens, T; with `prompt`, per layer."""

    @property
    def tokens_in_attention(self) -> int:
        """See `fedhpc.config.sections.TuningConfig`."""
        return self.num_tokens

    @property
    def tokens_before_text(self) -> int:
        """See `fedhpc.config.sections.TuningConfig`."""
        return self.num_tokens


class Tuning(Part, ABC):
    """One kind of trainable parameters on a frozen backbone.

    A module with a tuning loads PyTorch when it computes (`fedhpc.job.deferred`), so that reading a configuration
    does not; one of your own may import it at once.
    """

    Config: ClassVar[type[TuningConfig]] = TuningConfig
    has_layers = True
    """Whether it has tensors in the layers, of which some can be selected for the exchange."""
    packable = True
    """Whether several devices can pass through the backbone together."""
    changes_weights = False
    """Whether the backbone computes with changed weights, for one device at a time."""
    prompts_in_layers = False
    """Whether keys and values go before those of the text in every layer's attention."""
    masks_know_window = True
    """Whether its attention masks know a sliding window."""
    reads_structure = False
    """Whether it looks into the model's layers by name."""
    is_prompt_before_text = False
    """Whether all that is trained is a prompt before the text, which other tunings can read."""
    peft_type: str | None = None
    """What PEFT calls it; None where PEFT cannot hold it, or computes something else with it."""
    files: Mapping[str, str] = {}
    """What it reads beside the backbone, name -> SHA-256 of the content."""
    without_effect: tuple[str, ...] = ()
    """Ends of names of tensors that need not change the scores."""
    untrained: tuple[str, ...] = ()
    """Beginnings of names of tensors that stay as they are before round 0, on every device."""
    has_factors = False
    """Whether it exchanges changes of low rank as `lora_A.<module>` [L, r, in] and `lora_B.<module>` [L, out, r]."""
    keep: Sequence[str] = ()
    """Patterns of names of tensors that stay on the device (`exchange.keep`)."""
    freezes_others = False
    """Whether the layers that are not exchanged are not trained either (`selection.local_layers: frozen`)."""

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        self.config = config
        self.shape = shape
        self.per_layer: dict[str, tuple[int, ...]] = {}
        """Name -> shape [L, ...]."""
        self.frozen: Sequence[int] = ()
        """Layers whose tensors stay as they are."""
        self.added: Mapping[str, np.ndarray] = {}
        """What was added to the frozen weights [L, out, in] of modules, see `fedhpc.methods.Method.added`."""
        self.shared: dict[str, tuple[int, ...]] = {}
        if config.head == "linear":
            self.shared = {"head.weight": (num_classes, shape.output_width), "head.bias": (num_classes,)}

    @classmethod
    def check(cls, config: Any) -> None:
        """See `fedhpc.config.sections.Part.check`."""
        kind, strategy = config.tuning.kind, config.selection.strategy
        if not cls.has_layers and config.parts["selection"].needs_layers:
            raise ConfigError(
                f"selection.strategy: {strategy} selects layers, but tuning.kind: {kind} trains nothing in them; it "
                "needs selection.strategy: all"
            )
        if cls.untrained and config.sparse.fraction < 1:
            raise ConfigError(f"tuning.kind: {kind} has tensors that are not trained; it needs sparse.fraction: 1")
        if not cls.packable and config.device.pack != 1:
            raise ConfigError(
                f"tuning.kind: {kind} changes the weights for one device at a time; it needs device.pack: 1"
            )
        if cls.changes_weights and config.model.gradient_checkpointing:
            raise ConfigError(
                "model.gradient_checkpointing: true computes layers again with the frozen weights; tuning.kind: "
                f"{kind} needs false"
            )
        if cls.changes_weights and config.model.quantization is not None:
            raise ConfigError(
                f"model.quantization: {config.model.quantization} holds the frozen weights in few bits; tuning.kind: "
                f"{kind}, which changes them, needs null"
            )
        if cls.changes_weights and config.model.prepack_weights:
            raise ConfigError(f"tuning.kind: {kind} changes the weights; it needs model.prepack_weights: false")
        if cls.changes_weights and config.model.device_map == "auto":
            raise ConfigError(f"tuning.kind: {kind} needs model.device_map: single")

    def to_peft(self, tensors: Mapping[str, np.ndarray], model: Any, *, longest: int) -> PeftForm:
        """The tuned tensors as PEFT holds them, where there is a `peft_type`.

        Args:
            tensors: all of them, whole, by name.
            model: as transformers loads it, without its weights.
            longest: tokens of a text, at most.

        Raises:
            ModelError: PEFT computes something else with them, or cannot put them on this model.
        """
        raise NotImplementedError

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all trainable tensors, whole, by name."""
        return {**self.per_layer, **self.shared}

    @abstractmethod
    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """What the parameters add to the backbone's forward pass; arguments as those of `forward`."""

    def forward(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        *,
        dropout_seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Class scores [b, C] of a batch; arguments as those of `loss_terms`."""
        overlay = self.overlay(backbone, params, batch, dropout_seeds)
        if self.config.head == "linear":
            return linear_heads(params, backbone.pooled(batch, overlay), batch.sizes)
        return backbone.word_scores(batch, overlay)

    def soft_tokens(self, make: Callable[[Tensor, Tensor], Tensor], layer: int = 0) -> Overlay:
        """The overlay of T tokens before the text, whose positions follow theirs; see `SoftTokens`."""
        count = self.config.num_tokens
        return Overlay(tokens=SoftTokens(count=count, layer=layer, make=make), first_position=count)

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example [b], from class scores [b, C] and labels [b]."""
        if self.config.loss == "vocabulary":
            return -scores.gather(1, labels[:, None]).squeeze(1)
        return functional.cross_entropy(scores, labels, reduction="none")

    def loss_terms(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        *,
        dropout_seeds: Sequence[int] | None = None,
        twice: bool = False,
    ) -> Tensor:
        """What the devices' losses are means of, one device's behind the other's: the losses of a batch's examples, or
        of its trained tokens (see `Batch.terms`).

        Args:
            backbone: the frozen model.
            params: trainable tensors of each device that has examples in the batch.
            batch: `batch.sizes` says which examples belong to which device.
            dropout_seeds: of each device's dropout; None outside training.
            twice: whether the loss is differentiated twice.
        """
        if batch.targets is not None:
            return backbone.token_losses(batch, self.overlay(backbone, params, batch, dropout_seeds), twice=twice)
        return self.losses(self.forward(backbone, params, batch, dropout_seeds=dropout_seeds), batch.labels)

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """A tensor's rows [...], one for each layer; no gradient passes to those of frozen layers."""
        # Taken apart at once: the gradient of one row of a tensor is as large as the tensor.
        return [row.detach() if layer in self.frozen else row for layer, row in enumerate(tensor.unbind())]

    def initial(self, seed: int) -> dict[str, np.ndarray]:
        """All trainable tensors before round 0, the same for every device: normal, see `initial_scale`."""
        tensors = {}
        for name, shape in self.shapes.items():
            scale = self.initial_scale(name)
            tensors[name] = np.zeros(shape, np.float32)
            if scale:
                draw = generator(seed, purpose=f"initial {name}").standard_normal(shape, dtype=np.float32)
                tensors[name] = draw * np.float32(scale)
        return tensors

    def initial_scale(self, name: str) -> float:
        """Standard deviation of a tensor before round 0: `initializer_range` of the backbone, 0 for biases."""
        return 0.0 if name.endswith("bias") else self.shape.initializer_range

    def is_trained(self, name: str) -> bool:
        """Whether a tensor is trained at all."""
        return not name.startswith(self.untrained)

    @property
    def at_home(self) -> set[str]:
        """Names of the tensors of which nothing is exchanged."""
        return {
            name
            for name in self.shapes
            if not self.is_trained(name) or any(fnmatchcase(name, pattern) for pattern in self.keep)
        }

    def check_keep(self) -> None:
        """Raise ConfigError for a pattern in `keep` of no trained tensor, or where nothing is left to exchange."""
        names = [name for name in self.shapes if self.is_trained(name)]
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"exchange.keep: {pattern!r} matches none of the tensors of tuning.kind: {self.config.kind}: "
                    f"{', '.join(names)}"
                )
        if not self.at_home.symmetric_difference(self.shapes):
            raise ConfigError("exchange.keep: nothing is left to exchange; leave some tensors out of it")

    def know_devices(self, seed: int, num_devices: int, names: Sequence[str]) -> None:
        """What a tuning that differs from device to device may know of them.

        Args:
            seed: of the run.
            num_devices: N.
            names: of the devices, where the data give them some.

        Raises:
            ConfigError: its keys do not fit the devices.
        """

    def on_device(self, tensors: dict[str, np.ndarray], device: int) -> dict[str, np.ndarray]:
        """The part of whole tensors that a device has; the rest is zero."""
        return tensors

    @property
    def added_layout(self) -> Layout:
        """The weights [L, out, in] that may have something added to them."""
        return Layout({})

    def with_products(self, terms: Sequence[Vector], layers: Sequence[int]) -> Mapping[str, np.ndarray]:
        """`added` with the products B A of the factors in these vectors [n] of the exchanged layers."""
        raise NotImplementedError

    def exchanged(self, layers: Sequence[int]) -> Layout:
        """What crosses the network when ``layers`` are selected."""
        return Layout(_without(self.at_home, {**self._rows(len(layers)), **self.shared}))

    def local(self, layers: Sequence[int]) -> Layout:
        """What stays on the device when ``layers`` are selected."""
        home = self.at_home
        others = _without(home, self._rows(self.shape.num_layers - len(layers)))
        return Layout({**others, **{name: shape for name, shape in self.shapes.items() if name in home}})

    def trains_local(self, layers: Sequence[int]) -> bool:
        """Whether devices train tensors of their own when ``layers`` are exchanged."""
        home = self.at_home
        return any(
            prod(shape) > 0 and self.is_trained(name) and (name in home or not self.freezes_others)
            for name, shape in self.local(layers).shapes.items()
        )

    def trained(self) -> dict[str, np.ndarray]:
        """1 for every element that is trained, 0 for the others, by name; empty where all are."""
        if not self.frozen and not self.untrained:
            return {}
        masks = {name: np.full(shape, self.is_trained(name)) for name, shape in self.shapes.items()}
        for name in self.per_layer:
            masks[name][list(self.frozen)] = False
        return masks

    def split(
        self, tensors: Mapping[str, np.ndarray], layers: Sequence[int], *, out: Vector | None = None
    ) -> tuple[Vector, Vector]:
        """Whole tensors as (exchanged vector, local vector); the first is ``out`` if that is given."""
        others, home = self.other_layers(layers), self.at_home
        local = {name: tensors[name] if name in home else tensors[name][others] for name in {*self.per_layer} | home}
        return self.exchanged(layers).pack(self._taken(tensors, layers), out=out), self.local(layers).pack(local)

    def merge(self, exchanged: Vector, local: Vector, layers: Sequence[int]) -> dict[str, np.ndarray]:
        """The whole tensors from an exchanged and a local vector."""
        others, home = self.other_layers(layers), self.at_home
        global_views, local_views = self.exchanged(layers).views(exchanged), self.local(layers).views(local)
        tensors = {}
        for name in (*self.shared, *self.per_layer):
            if name in home or name in self.shared:
                tensors[name] = (local_views if name in home else global_views)[name].copy()
                continue
            tensors[name] = np.empty(self.per_layer[name], np.float32)
            tensors[name][list(layers)] = global_views[name]
            tensors[name][others] = local_views[name]
        return tensors

    def kept_elements(self, layers: Sequence[int]) -> np.ndarray:
        """Indices into the vector of all layers that remain when only ``layers`` are exchanged."""
        everything = self.exchanged(range(self.shape.num_layers))
        places = everything.views(np.arange(everything.size))
        return self.exchanged(layers).pack(self._taken(places, layers), np.intp)

    def _taken(self, tensors: Mapping[str, np.ndarray], layers: Sequence[int]) -> dict[str, np.ndarray]:
        """Of the tensors, what is exchanged when ``layers`` are selected."""
        names = self.exchanged(layers).shapes
        return {name: tensors[name][list(layers)] if name in self.per_layer else tensors[name] for name in names}

    def other_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers whose tensors stay on the device."""
        return [layer for layer in range(self.shape.num_layers) if layer not in layers]

    def check_on(self, backbone: Backbone) -> None:
        """Raise ModelError where a backbone would silently take no notice: a few tokens pass through it.

        Two would not do: they may be alike, or one of them take all attention, and then the gradient is zero too.
        """
        rng = torch.Generator().manual_seed(0)
        params = {
            name: torch.randn(shape, generator=rng).mul_(0.1).to(backbone.torch_device).requires_grad_()
            for name, shape in self.shapes.items()
        }
        batch = backbone.probe()
        who = f"tuning.kind: {self.config.kind}: model.name: {self.shape.name}"
        with no_surprise(f"{who} does not take it", f"; {OTHER_KIND}"):
            loss = self.loss_terms(backbone, [params], replace(batch, labels=batch.labels * 0)).sum()
            if not loss.requires_grad:
                raise ModelError(f"{who} takes no notice of it; {OTHER_KIND}")
            gradients = torch.autograd.grad(LOSS_SCALE * loss, list(params.values()), allow_unused=True)
        for name, gradient in zip(params, gradients, strict=True):
            if name.endswith(self.without_effect):
                continue
            by_layer = name in self.per_layer and gradient is not None
            if deaf := [
                row for row, part in enumerate(gradient if by_layer else [gradient]) if part is None or not part.any()
            ]:
                where = f"layers {deaf}" if by_layer else "any layer"
                raise ModelError(f"{who} takes no notice of {name} in {where}; {OTHER_KIND}")

    def _rows(self, count: int) -> dict[str, tuple[int, ...]]:
        return {name: (count, *shape[1:]) for name, shape in self.per_layer.items()}


def _without(names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name not in names}


class ModuleTuning(Tuning):
    """A tuning that changes what some modules of every layer put out."""

    reads_structure = True
    modules: tuple[str, ...]
    """Paths within a layer."""

    @abstractmethod
    def edit(self, module: str, rows: Sequence[Rows]) -> Edit:
        """What becomes of a module's output; rows in the backbone's type."""

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""
        dtype = backbone.base.dtype
        rows = [{name: self.rows(own[name].to(dtype)) for name in self.per_layer} for own in params]
        return Overlay(edits={module: self.edit(module, rows) for module in self.modules})


def linear_heads(params: Sequence[Params], pooled: Tensor, sizes: Sequence[int]) -> Tensor:
    """Class scores [b, C] from pooled hidden states [b, H], each device's examples by its own trained head."""
    parts = zip(params, at_least_float32(pooled).split(list(sizes)), strict=True)
    return torch.cat([functional.linear(part, head["head.weight"], head["head.bias"]) for head, part in parts])


def dropout(tensor: Tensor, probability: float, seed: int) -> Tensor:
    """Dropout whose mask depends on the seed alone."""
    rng = torch.Generator(tensor.device).manual_seed(seed)
    return tensor * torch.empty_like(tensor).bernoulli_(1 - probability, generator=rng) / (1 - probability)


def as_parameters(tensors: Mapping[str, np.ndarray], torch_device: torch.device) -> dict[str, Tensor]:
    """Trainable copies on a torch device."""
    # Not from_numpy: products round by how their operands lie in memory, and PyTorch's own memory always lies alike.
    return {name: torch.tensor(tensor, device=torch_device, requires_grad=True) for name, tensor in tensors.items()}
