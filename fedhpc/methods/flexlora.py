"""FlexLoRA: the mean of the devices' products B A, and its best approximation of the global rank.

Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources. Bai, Chen, Qian, Yao, Li.
NeurIPS 2024. https://arxiv.org/abs/2402.11505. The mean of the As times the mean of the Bs is not the mean of the
products; and where devices have ranks of their own (`tuning.ranks`), zeros would be averaged in.

Shapes: r rank, m devices.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedhpc.methods.base import ServerState
from fedhpc.methods.factors import FactorMethod, factors
from fedhpc.methods.updates import RoundUploads
from fedhpc.registry import METHODS


@METHODS.register("flexlora")
class FlexLoRA(FactorMethod):
    """B A = the r leading singular values and vectors of sum_i w_i B_i A_i; the mean of what is no factor.

    The singular values go into B, so that A has orthonormal rows; a device of rank r_i takes the leading r_i.
    """

    def update(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See `Method`; it looks at whole tensors."""
        uploads = uploads.in_device_order()
        new = super().update(state, uploads)
        params = new.params.copy()
        target, own = self.layout.views(params), [self.layout.views(vector) for vector in uploads.params]
        for a, b in factors(self.layout):
            for layer in range(len(target[a])):
                target[b][layer], target[a][layer] = leading(
                    np.stack([views[b][layer] for views in own]),
                    np.stack([views[a][layer] for views in own]),
                    uploads.weights,
                )
        return replace(new, params=params)


def leading(
    b: NDArray[np.float32], a: NDArray[np.float32], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B [out, r] and A [r, in] of the best approximation of rank r of the mean of the products.

    The mean is the product of the stacked factors, whose own small factors have the same singular values.

    Args:
        b: [m, out, r].
        a: [m, r, in].
        weights: [m].
    """
    rank = a.shape[1]
    left = np.concatenate([weight * part for weight, part in zip(weights, b.astype(np.float64), strict=True)], axis=1)
    right = np.concatenate(list(a.astype(np.float64)))
    if left.shape[1] < min(left.shape[0], right.shape[1]):
        (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, values, vt = np.linalg.svd(r_left @ r_right.T)
        u, vt = q_left @ u, vt @ q_right.T
    else:
        u, values, vt = np.linalg.svd(left @ right, full_matrices=False)
    u, vt = u[:, :rank] * values[:rank], vt[:rank]
    # A vector and its opposite are both right: the largest element of a row of A is positive.
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    found_b, found_a = np.zeros(b.shape[1:], np.float32), np.zeros(a.shape[1:], np.float32)
    found_b[:, : len(vt)], found_a[: len(vt)] = u * signs, vt * signs[:, None]
    return found_b, found_a
