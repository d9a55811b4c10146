"""How many tokens a text may have, with this backbone and this tuning."""

from collections.abc import Iterator
from typing import NamedTuple

from fedhpc.config import Config
from fedhpc.data.prepared import Description
from fedhpc.errors import ConfigError
from fedhpc.model.pretrained import BackboneShape
from fedhpc.registry import TUNINGS


class _Bound(NamedTuple):
    """One reason why a text may not have more tokens."""

    places: int
    """Tokens of the text and of what stands beside it, together."""
    has: str
    """Says what has so many places."""
    before: int
    """Prompt tokens that take places of their own."""
    remedies: list[str]
    """What helps, other than shorter texts."""


def most_tokens(config: Config, data: Description, shape: BackboneShape) -> int:
    """How many tokens a text may have: no more than in preparation, and no more than backbone and tuning take."""
    bounds = _bounds(config, data, shape)
    return min([data.max_length, *(bound.places - bound.before - _behind(data) for bound in bounds)])


def check_lengths(config: Config, data: Description, shape: BackboneShape) -> None:
    """ConfigError where a prepared text is longer than backbone and tuning take."""
    longest, behind = max(split["longest"] for split in data.splits.values()), _behind(data)
    for bound in _bounds(config, data, shape):
        needed, most = longest + bound.before + behind, bound.places - bound.before - behind
        if needed <= bound.places:
            continue
        parts = [f"texts have up to {longest} tokens"]
        parts += [f"prompts {bound.before}"] if bound.before else []
        parts += [f"class words {behind} behind the text"] if behind else []
        remedies = [f"prepare the data with --max-length {most}"] if most > 0 else []
        raise ConfigError(
            f"model.name: {config.model.name} {bound.has}, but {needed} are needed: {', '.join(parts)}; "
            + ", or ".join([*remedies, *bound.remedies])
        )


def check_answers(what: str, prompt: int, new: int, config: Config, data: Description, shape: BackboneShape) -> None:
    """ConfigError where a prompt and its answer together are longer than backbone and tuning take.

    Args:
        what: names the answer's length.
        prompt: tokens of the prompt.
        new: of the answer, at most.
    """
    for bound in _bounds(config, data, shape):
        room = bound.places - bound.before - prompt
        if new > room:
            before = f" behind {bound.before} prompt tokens" if bound.before else ""
            remedy = f"at most {room} can follow" if room > 0 else "nothing can follow"
            raise ConfigError(
                f"{what}: {new}: {config.model.name} {bound.has}, and a text to answer has {prompt} tokens{before}: "
                + remedy
            )


def _behind(data: Description) -> int:
    """Tokens of a class word that a decoder is given behind the text: all but its last."""
    return max((len(ids[:-1]) for ids in data.word_ids), default=0)


def _bounds(config: Config, data: Description, shape: BackboneShape) -> Iterator[_Bound]:
    tuning, attention = config.tuning, config.model.attention
    fewer = ["use a smaller tuning.num_tokens"]
    if shape.max_positions:
        before = tuning.tokens_before_text
        remedies = [*fewer, *tuning.fewer_positions] if before else []
        yield _Bound(shape.max_positions, f"has {shape.max_positions} positions", before, remedies)
    # Masks of these do not know the window, so all of a text has to be within it.
    whole = {
        f"model.attention: {attention}": attention != "sdpa",
        f"tuning.kind: {tuning.kind}": not TUNINGS[tuning.kind].masks_know_window,
        "class words of several tokens": _behind(data) > 0,
    }
    reason = next((name for name, applies in whole.items() if applies), None)
    if shape.sliding_window and reason:
        before = tuning.tokens_in_attention
        has = f"attends to {shape.sliding_window} positions at a time, and {reason} cannot handle more"
        yield _Bound(shape.sliding_window, has, before, fewer if before else [])
