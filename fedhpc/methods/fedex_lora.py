"""FedEx-LoRA: the means of the factors, and what their product lacks of the mean product in the frozen weights.

FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models. Singhal, Ponkshe, Vepakomma.
ACL 2025. https://arxiv.org/abs/2410.09432. The residual sum_i w_i B_i A_i - B A, of the means A and B, is
sum_i w_i (B_i - B) A_i: as many terms as devices, which is how it is sent.
"""

import numpy as np

from fedhpc.methods.factors import FactorMethod, factors
from fedhpc.methods.updates import RoundUploads, Vector
from fedhpc.registry import METHODS


@METHODS.register("fedex_lora")
class FedExLoRA(FactorMethod):
    """P^{t+1} = sum_i w_i P_i, and W = W + sum_i w_i (B_i - B) A_i."""

    adds_weights = True

    def added(self, uploads: RoundUploads) -> list[Vector]:
        """See `Method`: w_i (B_i - B) and A_i of every device."""
        uploads = uploads.in_device_order()
        terms = [vector.copy() for vector in uploads.params]
        views = [self.layout.views(term) for term in terms]
        for _, b in factors(self.layout):
            mean = np.average([each[b] for each in views], axis=0, weights=uploads.weights)
            for each, weight in zip(views, uploads.weights, strict=True):
                each[b][...] = weight * (each[b] - mean)
        return terms
