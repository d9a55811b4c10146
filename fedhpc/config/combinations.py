"""What does not go together in a configuration, whichever parts it names."""

from collections.abc import Iterator
from typing import Any

from fedhpc.config.sections import FEWEST_MASKED
from fedhpc.registry import STRATEGIES


def check_privacy(config: Any) -> None:
    """Refuse what would tell more of a device than its clipped change.

    Raises:
        ValueError: with what was found, why, and what to take instead.
    """
    if config.privacy.is_on:
        for is_undone, found, reason in _enemies_of_privacy(config):
            if is_undone:
                raise ValueError(
                    f"privacy.clip: {config.privacy.clip:g} does not go together with {found}: it {reason}"
                )


def check_combinations(config: Any) -> None:
    """Refuse keys of different sections that do not go together.

    Raises:
        ValueError: with what was found and what is valid.
    """
    if config.tuning.head != "verbalizer" and config.tuning.loss == "vocabulary":
        reason = "a linear head has no vocabulary" if config.tuning.head == "linear" else "language_model always has it"
        raise ValueError(f"tuning.loss: vocabulary needs tuning.head: verbalizer; {reason}")
    if config.device.pack != 1 and config.model.backbone_dropout:
        raise ValueError("model.backbone_dropout: true draws one mask for a whole batch; it needs device.pack: 1")
    if config.device.warmup >= config.federation.rounds:
        raise ValueError(
            f"device.warmup: {config.device.warmup} must be fewer than federation.rounds: {config.federation.rounds}"
        )
    if config.exchange.sums_only and config.trace:
        raise ValueError("trace: true writes each upload; it needs exchange.mode: gather")
    if config.devices_sampled > config.federation.num_training:
        raise ValueError(
            f"simulation.over_selection: {config.simulation.over_selection:g} samples {config.devices_sampled} devices "
            f"for {config.federation.devices_per_round} a round, of {config.federation.num_training} that can train; "
            "lower it or federation.sample_rate"
        )
    if config.exchange.mode == "secure" and (sampled := config.federation.devices_per_round) < FEWEST_MASKED:
        raise ValueError(
            f"exchange.mode: secure needs at least {FEWEST_MASKED} devices a round, and federation.sample_rate: "
            f"{config.federation.sample_rate:g} gives {sampled}: the sum of two tells each the other's upload"
        )
    if config.exchange.mode == "secure" and 3 * config.federation.devices_per_round < 2 * config.devices_sampled:
        raise ValueError(
            f"simulation.over_selection: {config.simulation.over_selection:g} leaves out more than a third of the "
            "devices that a round samples, which exchange.mode: secure does not survive; valid: at most 0.5"
        )
    if config.selection.local_layers == "frozen" and config.sparse.fraction < 1:
        raise ValueError(
            "selection.local_layers: frozen leaves nothing to train in them; sparse.fraction below 1 needs trained"
        )
    if config.exchange.keep and (config.selection.is_automatic or config.sparse.fraction < 1):
        other = "selection.ratio: auto" if config.selection.is_automatic else "sparse.fraction below 1"
        raise ValueError(f"exchange.keep does not go together with {other}, which begins devices' own tensors anew")
    if config.selection.is_automatic and config.model.attention != "sdpa":
        raise ValueError(
            f"selection.ratio: auto differentiates twice, which model.attention: {config.model.attention} cannot; it "
            "needs sdpa"
        )
    if config.model.dtype == "float32" and config.model.attention != "sdpa":
        raise ValueError(f"model.attention: {config.model.attention} needs model.dtype: bfloat16 or float16")


def _enemies_of_privacy(config: Any) -> Iterator[tuple[bool, str, str]]:
    """What privacy does not go together with: whether it is there, the key and value, and why and what else to take."""
    server, exchange, selection = config.server, config.exchange, config.selection
    method, strategy, encoding = (config.parts[name] for name in ("server", "selection", "exchange"))
    unscored = ", ".join(name for name, part in STRATEGIES.items() if not part.scored)
    yield (
        not exchange.sums_only,
        f"exchange.mode: {exchange.mode}",
        "shows the server each upload; take exchange.mode: reduce",
    )
    yield (
        (found := encoding.approximates(exchange)) is not None,
        str(found),
        "sends something else than the clipped vector; take exchange.encoding: dense and exchange.dtype: float32",
    )
    yield config.trace, "trace: true", "writes uploads as they are; take trace: false"
    yield (
        server.weights != "uniform",
        f"server.weights: {server.weights}",
        "lets devices with more data add more; take server.weights: uniform",
    )
    yield (
        not method.works_with_sums(server),
        f"server.method: {method.label(server)}",
        "needs more of the uploads than one sum of vectors; take for example fedavg, fedavgm, fedadam, fedprox or "
        "server.variant: drift_corrected",
    )
    yield (
        strategy.scored,
        f"selection.strategy: {selection.strategy}",
        f"selects by what it reads of the devices' data; take one of {unscored}",
    )
    yield (
        selection.is_automatic,
        "selection.ratio: auto",
        "decides by what it reads of the devices' data; take a number",
    )
    yield (
        config.simulation.over_selection > 0,
        f"simulation.over_selection: {config.simulation.over_selection:g}",
        "takes the devices that arrive first, which is no uniform sample, and what a round costs relies on one; take 0",
    )
    yield (
        config.device.pack != 1,
        f"device.pack: {config.device.pack}",
        "pads several devices' texts to one length, so that one's data touch another's rounding; take device.pack: 1",
    )
