"""FFA-LoRA: LoRA whose A stays as it was drawn, so that the mean of the products B A is the product of the means.

Improving LoRA in Privacy-preserving Federated Learning. Sun, Li, Li, Ding. ICLR 2024. https://arxiv.org/abs/2403.12313.
A comes from the seed: it is neither trained nor sent.
"""

from fedhpc.registry import TUNINGS
from fedhpc.tuning.lora import LoRA


@TUNINGS.register("ffa_lora")
class FFALoRA(LoRA):
    """`lora_B.<module>` [L, out, r] is trained; `lora_A.<module>` [L, r, in] is not."""

    has_factors = False
    untrained = ("lora_A.",)
