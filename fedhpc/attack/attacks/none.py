"""No attack: every device does what it should."""

from fedhpc.attack.attack import Attack
from fedhpc.config.sections import AttackConfig
from fedhpc.registry import ATTACKS


@ATTACKS.register("none")
class NoAttack(Attack):
    """Nobody is bad."""

    Config = AttackConfig
