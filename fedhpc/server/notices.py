"""What the user should know about a configuration although it is no error."""

from fedhpc.config import DEFAULTS, WITH_TOKENS, Config, Section

OF_KINDS = {
    "num_tokens": WITH_TOKENS,
    "layer": ("late_prompt",),
    "bottleneck": ("adapter", "late_prompt", "instance_prompt", "attempt"),
    "sources": ("attempt",),
    "rank": ("lora",),
    "alpha": ("lora",),
    "position_offset": ("prompt",),
    "dropout": ("prompt",),
}
"""Key of the tuning -> the kinds that use it."""
OF_METHODS = {
    "variant": ("fedpeptao",),
    "control_variates": ("fedpeptao",),
    "second_momentum": ("fedadam", "fedyogi"),
    "tau": ("fedadam", "fedyogi"),
    "proximal": ("fedprox",),
    **{key: tuple(name for name, used in DEFAULTS.items() if key in used) for key in ("learning_rate", "momentum")},
}
"""Key of the server -> the methods, or variants, that use it."""
PAPER_LEARNING_RATE = 1e-2
"""Device learning rate below which the variants `paper` and `released` are warned about."""


def notices(config: Config) -> list[str]:
    """What the user should know although it is no error."""
    found = [
        f"tuning.kind: {config.tuning.kind} does not use tuning.{key}"
        for key, kinds in OF_KINDS.items()
        if config.tuning.kind not in kinds and _is_set(config, f"tuning.{key}")
    ]
    server = config.server
    found += [
        f"server.method: {server.method} does not use server.{key}"
        for key, methods in OF_METHODS.items()
        if not {server.method, server.name} & set(methods) and _is_set(config, f"server.{key}")
    ]
    selection, order, fraction = config.selection, config.curriculum.order, config.sparse.fraction
    strategy, ratio, optimizer = selection.strategy, selection.ratio, config.device.optimizer
    for keys, reason, applies in (
        (("selection.distance",), f"selection.strategy: {strategy}", strategy not in ("score", "lowest_score")),
        (
            ("selection.batch_size",),
            f"selection.strategy: {strategy}",
            strategy in ("all", "first", "last", "random", "explicit"),
        ),
        (("selection.auto_by", "selection.warmup_rounds"), f"selection.ratio: {ratio}", ratio != "auto"),
        (("device.reset_moments",), "device.optimizer: sgd", optimizer == "sgd"),
        (("curriculum.start", "curriculum.end"), "curriculum.order: random", order == "random"),
        (("sparse.momentum",), "sparse.fraction: 1", fraction == 1),
    ):
        found += [f"{key} has no effect with {reason}" for key in keys if applies and _is_set(config, key)]
    if fraction < 1 and (strategy == "all" or ratio == 1):
        all_of_them = "selection.strategy: all" if strategy == "all" else "selection.ratio: 1"
        found.append(f"sparse.fraction has no effect: with {all_of_them} no layer stays on the devices")
    if selection.is_automatic and selection.warmup_rounds >= config.federation.rounds:
        found.append(
            f"selection.ratio: auto decides after selection.warmup_rounds: {selection.warmup_rounds}, but the "
            f"run ends after federation.rounds: {config.federation.rounds}; all layers are exchanged to the end"
        )
    if server.name in ("paper", "released") and config.device.learning_rate < PAPER_LEARNING_RATE:
        found.append(
            f"server.variant: {server.name} is known to diverge at small device.learning_rate (found "
            f"{config.device.learning_rate}); the published one is 0.04"
        )
    return found


def _is_set(config: Config, key: str) -> bool:
    """Whether a key of a section differs from its default."""
    section, name = key.split(".")
    value: Section = getattr(config, section)
    return getattr(value, name) != type(value).model_fields[name].default
