"""Bad devices train on wrong classes.

Data Poisoning Attacks Against Federated Learning Systems. Tolpegin, Truex, Gursoy, Liu. ESORICS 2020.
https://arxiv.org/abs/2007.08432. There one class becomes one other; here every class c of C becomes C - 1 - c, as Fang,
Cao, Jia, Gong, USENIX Security 2020, https://arxiv.org/abs/1911.11815, section 5.1, have it.
"""

from typing import Any

import numpy as np

from fedhpc.attack.attack import Attack
from fedhpc.errors import ConfigError
from fedhpc.registry import ATTACKS


@ATTACKS.register("label_flip")
class LabelFlip(Attack):
    """Class c becomes C - 1 - c."""

    @classmethod
    def check(cls, config: Any) -> None:
        """See `fedhpc.config.sections.Part.check`."""
        if config.tuning.head == "language_model":
            raise ConfigError("attack.kind: label_flip needs classes; texts to be generated have none")

    def labels(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Attack`."""
        return num_classes - 1 - labels
