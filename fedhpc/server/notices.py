"""What the user should know about a configuration although it is no error."""

from fedhpc.config import Config, unused_keys
from fedhpc.config.sections import Section


def notices(config: Config) -> list[str]:
    """What the user should know although it is no error."""
    found = [
        f"{registry.section}.{registry.key}: {getattr(getattr(config, registry.section), registry.key)} does not use "
        f"{registry.section}.{key}"
        for registry, key in unused_keys(config)
    ]
    selection, order, fraction = config.selection, config.curriculum.order, config.sparse.fraction
    strategy, ratio, optimizer = selection.strategy, selection.ratio, config.device.optimizer
    for keys, reason, applies in (
        (("selection.auto_by", "selection.warmup_rounds"), f"selection.ratio: {ratio}", ratio != "auto"),
        (("device.reset_moments",), "device.optimizer: sgd", optimizer == "sgd"),
        (("curriculum.start", "curriculum.end"), "curriculum.order: random", order == "random"),
        (("sparse.momentum",), "sparse.fraction: 1", fraction == 1),
    ):
        found += [f"{key} has no effect with {reason}" for key in keys if applies and _is_set(config, key)]
    all_layers = not config.parts["selection"].needs_layers
    for key, is_given in (
        ("sparse.fraction", fraction < 1),
        ("selection.local_layers", _is_set(config, "selection.local_layers")),
    ):
        if is_given and (all_layers or ratio == 1):
            all_of_them = f"selection.strategy: {strategy}" if all_layers else "selection.ratio: 1"
            found.append(f"{key} has no effect: with {all_of_them} no layer stays on the devices")
    if selection.is_automatic and selection.warmup_rounds >= config.federation.rounds:
        found.append(
            f"selection.ratio: auto decides after selection.warmup_rounds: {selection.warmup_rounds}, but the "
            f"run ends after federation.rounds: {config.federation.rounds}; all layers are exchanged to the end"
        )
    for part in config.parts.values():
        found += part.notices(config)
    return found


def _is_set(config: Config, key: str) -> bool:
    """Whether a key of a section differs from its default."""
    section, name = key.split(".")
    value: Section = getattr(config, section)
    return getattr(value, name) != type(value).model_fields[name].default
