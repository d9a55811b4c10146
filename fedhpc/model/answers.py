"""The answers of a cloze: class words as tokens, and how a decoder scores words of several tokens in one pass.

Shapes: b examples, s positions, k branch tokens, C classes, V words of the vocabulary.
"""

import torch
from torch import Tensor

from fedhpc.data.prepared import Batch


class Answers:
    """The class words as tokens; words of several tokens become branches behind the text (decoders)."""

    def __init__(self, word_ids: list[list[int]], *, full_vocabulary: bool = False) -> None:
        self.word_ids = word_ids
        self.first_tokens = [ids[0] for ids in word_ids if ids]
        branches = [
            (branch, depth, token) for branch, ids in enumerate(word_ids) for depth, token in enumerate(ids[:-1])
        ]
        self.branch_tokens = [token for _, _, token in branches]
        self._branch = torch.tensor([branch for branch, _, _ in branches], dtype=torch.int64)
        self._depth = torch.tensor([depth for _, depth, _ in branches], dtype=torch.int64)
        self.needs_vocabulary = full_vocabulary or bool(branches)

    def branch(self, batch: Batch, first_position: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch with k branch tokens behind each text: ids and positions [b, s+k], mask [b, 1, s+k, s+k].

        A branch token sees its text up to the slot and its own branch up to itself, no other answer.
        """
        device, (b, s), k = batch.input_ids.device, batch.input_ids.shape, len(self.branch_tokens)
        tokens = torch.tensor(self.branch_tokens, device=device).expand(b, k)
        branch, depth = self._branch.to(device), self._depth.to(device)
        positions = torch.cat([torch.arange(s, device=device).expand(b, s), batch.slots[:, None] + 1 + depth], dim=1)
        text = torch.arange(s, device=device)
        mask = torch.zeros(b, s + k, s + k, dtype=torch.bool, device=device)
        mask[:, :s, :s] = (text[:, None] >= text) & batch.attention_mask.bool()[:, None, :]
        mask[:, s:, :s] = (text <= batch.slots[:, None])[:, None, :]
        mask[:, s:, s:] = (branch[:, None] == branch) & (depth[:, None] >= depth)
        return torch.cat([batch.input_ids, tokens], dim=1), positions + first_position, mask.unsqueeze(1)

    def mean_log_probability(self, log_probabilities: Tensor) -> Tensor:
        """Scores [b, C] from log-probabilities [b, 1+k, V] at the slot and at the branch tokens."""
        place = {(int(b), int(d)): 1 + i for i, (b, d) in enumerate(zip(self._branch, self._depth, strict=True))}
        columns = [
            torch.stack(
                [log_probabilities[:, place.get((c, d - 1), 0), token] for d, token in enumerate(ids)], dim=1
            ).mean(1)
            for c, ids in enumerate(self.word_ids)
        ]
        return torch.stack(columns, dim=1)
