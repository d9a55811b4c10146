"""Rows of a backbone's word embeddings, without the rest of its weights."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from fedhpc.errors import ModelError
from fedhpc.model.pretrained import load_pretrained
from fedhpc.model.weight_files import mapped_weights


class WordEmbeddings:
    """Those of a local or cached model, read when they are asked for.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The word embeddings, float32 [m, H], of token ids, int64 [m].

        Raises:
            ModelError: the model cannot be read, or has fewer tokens.
        """
        if len(ids) and ids.max() >= len(self._table):
            raise ModelError(
                f"model.name: {self.name} has {len(self._table)} tokens, and the data hold token {ids.max()}"
            )
        return np.asarray(self._table[torch.from_numpy(ids)].float())

    @cached_property
    def _table(self) -> Any:
        return load_pretrained(_table, self.name)


def _table(name: str) -> Any:
    """The matrix as it lies in safetensors files, mapped into memory; of other files the whole model is read."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    words = model.get_input_embeddings().weight
    (key,) = (key for key, value in model.named_parameters() if value is words)
    stored = mapped_weights(name) or {}
    found = [value for name, value in stored.items() if f".{name}".endswith(f".{key}") and value.shape == words.shape]
    if len(found) == 1:
        return found[0]
    return AutoModel.from_pretrained(name).get_input_embeddings().weight.detach()
