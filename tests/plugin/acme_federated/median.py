"""The median of the uploads instead of their mean, which few bad devices cannot move far.

Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin, Chen, Ramchandran, Bartlett. ICML 2018.
https://arxiv.org/abs/1803.01498, algorithm 1, option I.
"""

from dataclasses import replace

import numpy as np

import fedhpc


@fedhpc.register_method("median")
class Median(fedhpc.Method):
    """P^{t+1} = P^t + share (median_i P_i - P^t), element by element."""

    class Config(fedhpc.MethodConfig):
        """Keys."""

        share: float = 1.0
        """Of the way to the median."""

    def init(self, params):
        """No state but the parameters."""
        return fedhpc.ServerState(round=0, params=params)

    def step(self, state, uploads):
        """One round."""
        start = state.params.astype(np.float64)
        median = np.median(np.stack(uploads.params).astype(np.float64), axis=0)
        params = (start + self.config.share * (median - start)).astype(np.float32)
        return replace(state, round=state.round + 1, params=params)
