"""The frozen backbone: loaded, set up for a run, and found by a few texts to compute what the model itself does."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fedhpc.config.sections import ModelConfig, TuningConfig
from fedhpc.data.prepared import Batch, Description, Targets
from fedhpc.errors import ModelError
from fedhpc.model.answers import Answers
from fedhpc.model.forward import Forward
from fedhpc.model.last_layer import LastLayer
from fedhpc.model.numbers import NOT_TAKEN, at_least_float32, no_surprise
from fedhpc.model.overlay import Overlay
from fedhpc.model.prepacking import prepack
from fedhpc.model.pretrained import LINEAR_HEAD, load_frozen, shape_of
from fedhpc.registry import TUNINGS

PROBE_TOKENS = 8
ROUNDING = 3e-5
"""Relative difference of two float32 results of the same sums in another order, after tens of layers."""
PREPACKED = "model.prepack_weights: true"
OTHER_WORDS = f"choose words of one token each in a task file, or {LINEAR_HEAD}"


class Backbone(Forward):
    """A run's frozen model.

    Args:
        config: what is loaded, and how.
        tuning: what will be laid over it.
        data: what the texts were prepared for.
        torch_device: where it computes.

    Raises:
        ModelError: it cannot be loaded, or fedhpc does not compute with it what the model itself does.
    """

    def __init__(self, config: ModelConfig, tuning: TuningConfig, data: Description, torch_device: torch.device):
        if config.prepack_weights and torch_device.type != "cpu":
            raise ModelError(f"{PREPACKED} is for CPUs, and this rank computes on {torch_device}; leave the key out")
        self.generates = data.head == "language_model"
        """Whether texts are generated, not classified."""
        self._has_dropout, self._recomputes = config.backbone_dropout, config.gradient_checkpointing
        model = self._load(config, data, torch_device)
        model.generation_config = GenerationConfig()  # a model's own may ask for more than greedy decoding
        super().__init__(
            model,
            kind=data.kind,
            answers=Answers(data.word_ids, full_vocabulary=self.generates or tuning.loss == "vocabulary"),
            has_head=data.head != "linear",
            # Spread over several GPUs, the model takes its input where its embeddings are.
            torch_device=model.device if config.device_map == "auto" else torch_device,
        )
        self._modes = LayerModes(self._layers)
        if config.gradient_checkpointing:
            self._recompute_layers(config.name)
        self._check(config, tuning, longest=max(split["longest"] for split in data.splits.values()))

    def _load(self, config: ModelConfig, data: Description, torch_device: torch.device) -> Any:
        return load_frozen(config, head=data.head, kind=data.kind, torch_device=torch_device)

    def training_mode(self, training: bool, *, dropout: bool = True) -> None:
        """Train mode only where dropout or gradient checkpointing asks for it; weights stay frozen.

        Args:
            dropout: whether there may be dropout; False for gradients that are measured, not stepped along.
        """
        self._modes.drop_out = training and dropout and self._has_dropout
        self.model.train(self._modes.drop_out)
        self._modes.set(training and (self._modes.drop_out or self._recomputes))

    def _recompute_layers(self, name: str) -> None:
        refusal = f"model.gradient_checkpointing: model.name: {name}: a {self.base.config.model_type} model has none"
        # Transformers renamed it within version 5; the old name warns where the new one exists.
        old = self.model.gradient_checkpointing_enable
        enable = getattr(self.model, "activation_checkpointing_enable", old)
        with no_surprise(refusal):
            enable({"use_reentrant": False, "context_fn": lambda: (self._modes, self._modes)})
        if not self._layers:
            raise ModelError(f"{refusal}: its layers cannot be told apart")

    def probe(self, *lengths: int) -> Batch:
        """Texts of a few tokens, all different, from all over the vocabulary."""
        first = int(getattr(self.base.config, "pad_token_id", None) == 0)  # padding may have a position of its own
        last = len(self.base.get_input_embeddings().weight) - 1
        size = np.array(lengths or [PROBE_TOKENS])
        ids = torch.linspace(first, last, int(size.max()), device=self.torch_device).long().expand(len(size), -1)
        slots = torch.from_numpy(size - 1).to(self.torch_device)
        mask = torch.arange(ids.shape[1], device=self.torch_device) <= slots[:, None]
        sizes = (len(size),)
        places = np.argwhere(np.arange(1, size.max()) < size[:, None])
        texts, columns = (torch.from_numpy(each).to(self.torch_device) for each in places.T.copy())
        targets = Targets(texts, columns, ids[texts, columns + 1], counts=(len(places),))
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            slots=slots,
            labels=slots,
            sizes=sizes,
            lengths=size,
            targets=targets if self.generates else None,
        )

    @torch.no_grad()
    def _check(self, config: ModelConfig, tuning: TuningConfig, *, longest: int) -> None:
        """Refuse what would not give the model's own numbers; what a tuning needs, `Tuning.check` looks for.

        No logits of other words than the class words are computed from here on, unless they are needed.
        """
        who = f"model.name: {config.name}: a {self.base.config.model_type} model"
        batch = self.probe()
        plain = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with no_surprise(f"{who} cannot be used"):
            hidden = self.base(**plain).last_hidden_state.to(self.torch_device)
            known = self._same(self.hidden(batch), hidden)
        if not known:
            raise ModelError(f"{who} numbers its positions as fedhpc does not know, and cannot be used")
        if config.prepack_weights:
            self._prepack(batch)
            hidden = self.base(**plain).last_hidden_state.to(self.torch_device)
        self._choose_rows(config, tuning, longest)
        if self._head is None:
            return
        with no_surprise(f"{who} cannot score class words; {LINEAR_HEAD}"):
            logits = self.model(**plain).logits.to(self.torch_device)
            if not self.answers.needs_vocabulary:
                self._head.keep(self.answers.first_tokens)
                logits = logits[..., self.answers.first_tokens]
            known = self._same(self._logits(hidden), at_least_float32(logits))
        if not known:
            other = "choose another model" if self.generates else LINEAR_HEAD
            raise ModelError(f"{who} has logits that fedhpc does not know how to compute; {other}")
        if self.answers.branch_tokens:
            with no_surprise(f"{who} cannot score class words of several tokens; {OTHER_WORDS}"):
                right = self._branches_are_right()
            if not right:
                raise ModelError(
                    f"{who} does not only look where the attention mask says, and so cannot score class words of "
                    f"several tokens; {OTHER_WORDS}"
                )
        if config.attention == "sdpa" and not self.generates:
            self._narrow_last_layer(self._probe_overlays(config, tuning))

    def _prepack(self, batch: Batch) -> None:
        """Have the layers compute with prepacked weights, and see with a batch that they can."""
        about, advice = PREPACKED, "leave the key out"
        with no_surprise(f"{about}: PyTorch cannot do so with {self.base.dtype} on this CPU", f"; {advice}"):
            count = prepack(self.base)
            self.hidden(batch)
        if not count:
            raise ModelError(f"{about}: a {self.base.config.model_type} model has no plain linear modules; {advice}")

    def _branches_are_right(self) -> bool:
        """Whether answers of several tokens, behind a text and a shorter one, score as the model does each alone."""
        batch = self.probe(PROBE_TOKENS, PROBE_TOKENS - 3)
        ids, slots = batch.input_ids, batch.slots
        scores = self.word_scores(batch)
        longest = sorted(range(len(self.answers.word_ids)), key=lambda c: -len(self.answers.word_ids[c]))[:2]
        for row, slot in enumerate(slots.tolist()):
            for c in longest:
                word = torch.tensor(self.answers.word_ids[c], device=self.torch_device)
                alone = torch.cat([ids[row, : slot + 1], word])[None]
                logits = self.model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits.to(self.torch_device)
                logits = at_least_float32(logits)[0, slot:-1]
                score = logits.log_softmax(-1).gather(1, word[:, None]).mean()
                if not self._same(scores[row, c], score, size=logits):
                    return False
        return True

    def _same(self, ours: Tensor, theirs: Tensor, *, size: Tensor | None = None) -> bool:
        """Whether two results differ by rounding alone.

        Args:
            size: what the results were computed from, if that is larger than they are: it was rounded already.
        """
        size = theirs if size is None else size
        tolerance = max(ROUNDING, 4 * torch.finfo(self.base.dtype).eps)
        usual = float(size[size.isfinite()].double().square().mean().sqrt().nan_to_num())
        return torch.allclose(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance * usual, equal_nan=True)

    def _choose_rows(self, config: ModelConfig, tuning: TuningConfig, longest: int) -> None:
        """Let texts lie one behind the other, if they have the hidden states then that they have padded."""
        if config.attention == "sdpa":
            window = shape_of(config.name, self.base.config).sliding_window
            self._in_rows = self._rows_are_right(self._probe_overlays(config, tuning), window, longest)

    def _rows_are_right(self, overlays: Sequence[Overlay], window: int | None, longest: int) -> bool:
        lengths = (PROBE_TOKENS, 3, 5)
        if window is not None and window < longest + PROBE_TOKENS:  # with prompts, shorter texts may pass it
            lengths = (max(lengths[0], min(longest, window + 2)), *lengths[1:])
        batch = self.probe(*lengths)
        in_text = torch.from_numpy(np.flatnonzero(np.arange(max(lengths)) < batch.lengths[:, None]))
        with suppress(*NOT_TAKEN):
            for overlay in overlays:
                found = []
                for self._in_rows in (False, True):
                    hidden = self.hidden(batch, overlay).flatten(0, 1)
                    found.append(hidden[in_text.to(hidden.device)])
                if not self._same(*found):
                    return False
            return True
        return False

    def _probe_overlays(self, config: ModelConfig, tuning: TuningConfig) -> list[Overlay]:
        """No prompts, and where a tuning has them, some."""
        if not TUNINGS[tuning.kind].prompts_in_layers:
            return [Overlay()]
        shape = shape_of(config.name, self.base.config)
        prompts = Overlay(
            prompts=[torch.full((1, 2, 1, shape.key_width), 0.1, device=self.torch_device)] * shape.num_layers
        )
        return [Overlay(), prompts]

    @torch.no_grad()
    def _narrow_last_layer(self, overlays: Sequence[Overlay]) -> None:
        """Compute the last layer at the answer slots alone, if that gives the same numbers with this model."""
        batches = [self.probe(2, 2, 3), self.probe(3, 3, 3)]
        slots = torch.arange(3, device=self.torch_device)
        tries = [
            (replace(batch, slots=slots.minimum(batch.slots)), overlay) for batch in batches for overlay in overlays
        ]
        same = False
        # What raises here does so in `Tuning.check` too, or in nothing that is asked for.
        with suppress(*NOT_TAKEN):
            wanted = [self._at_slots(*each) for each in tries]
            self._last_layer = LastLayer(self._layers[-1])
            found = [self._at_slots(*each) for each in tries]
            same = self._same(torch.cat(found), torch.cat(wanted))
        if self._last_layer and not same:
            self._last_layer.restore()
            self._last_layer = None


class LayerModes:
    """Train mode of the layers: for gradient checkpointing they must be in it when they are called.

    In the context of this object, which gradient checkpointing enters whenever it computes a layer, they are in it only
    if they are to drop out: some have dropout of their own.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self.drop_out = False

    def set(self, training: bool) -> None:
        """Set the mode of the layers themselves, not of the modules in them."""
        for layer in self._layers:
            layer.training = training

    def __enter__(self) -> None:
        self.set(self.drop_out)

    def __exit__(self, *_: object) -> None:
        self.set(True)
