"""FLoRA: the devices' changes are stacked, their sum goes into the frozen weights, and the factors begin anew.

FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations. Wang, Shen, He, Sun, Wang,
Lyu, Li. NeurIPS 2024. https://arxiv.org/abs/2409.05976. The weight w_i of a device is on one of its factors alone.
There A is drawn anew in each round; here it is drawn once.
"""

from dataclasses import replace

from fedhpc.methods.base import ServerState
from fedhpc.methods.factors import FactorMethod, factors
from fedhpc.methods.updates import RoundUploads, Vector
from fedhpc.registry import METHODS


@METHODS.register("flora")
class FLoRA(FactorMethod):
    """W = W + sum_i w_i B_i A_i, then B = 0 and A as before round 0; the mean of what is no factor."""

    adds_weights = True

    def update(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See `Method`: the factors of P^t are those of before round 0."""
        new = super().update(state, uploads)
        params = new.params.copy()
        target, start = self.layout.views(params), self.layout.views(state.params)
        for pair in factors(self.layout):
            for name in pair:
                target[name][...] = start[name]
        return replace(new, params=params)

    def added(self, uploads: RoundUploads) -> list[Vector]:
        """See `Method`: w_i B_i and A_i of every device."""
        uploads = uploads.in_device_order()
        terms = [vector.copy() for vector in uploads.params]
        for term, weight in zip(terms, uploads.weights, strict=True):
            views = self.layout.views(term)
            for _, b in factors(self.layout):
                views[b] *= weight
        return terms
