"""Scores of generated text against references.

Each text is scored by itself, and the scores of all are averaged, but BLEU's, which belongs to all texts together.
"""

import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from fedhpc.errors import ConfigError
from fedhpc.registry import GENERATION_METRICS

EXTRA = "install the packages of the extra: pip install 'fedhpc[generation]'"


class GenerationMetric(ABC):
    """One score of generated texts."""

    title: ClassVar[str]
    """What reports call it."""
    less_is_better: ClassVar[bool] = False
    """Whether the lowest is the best."""
    is_of_each: ClassVar[bool] = True
    """Whether one answer has a score of its own."""

    @abstractmethod
    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The score of all answers [n] together, 0 to 1; of each, one reference or several [n]."""

    @classmethod
    def check(cls) -> None:
        """ConfigError where a package is not there."""
        return


@GENERATION_METRICS.register("exact_match")
class ExactMatch(GenerationMetric):
    """Share of the answers that are a reference, but for case, punctuation, articles and white space (SQuAD)."""

    title = "exact match"

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """See `GenerationMetric`."""
        pairs = zip(answers, references, strict=True)
        return _mean([float(any(normal(answer) == normal(each) for each in own)) for answer, own in pairs])


@GENERATION_METRICS.register("token_f1")
class TokenF1(GenerationMetric):
    """F1 of the words that an answer shares with the reference it is nearest to, normalised as SQuAD does."""

    title = "token F1"

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """See `GenerationMetric`."""
        pairs = zip(answers, references, strict=True)
        return _mean([max(_f1(normal(answer).split(), normal(each).split()) for each in own) for answer, own in pairs])


@GENERATION_METRICS.register("rouge_l")
class RougeL(GenerationMetric):
    """F1 of the longest common subsequence with the reference it is nearest to, words stemmed (rouge-score)."""

    title = "ROUGE-L"

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """See `GenerationMetric`."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        pairs = zip(answers, references, strict=True)
        return _mean([scorer.score_multi(list(own), answer)["rougeL"].fmeasure for answer, own in pairs])

    @classmethod
    def check(cls) -> None:
        """See `GenerationMetric`."""
        try:
            import rouge_score  # noqa: F401
        except ImportError:
            raise ConfigError(f"the metric rouge_l needs the package rouge-score; {EXTRA}") from None


@GENERATION_METRICS.register("bleu")
class Bleu(GenerationMetric):
    """BLEU of all answers together, against all references of each (sacrebleu, its usual settings)."""

    title = "BLEU"
    is_of_each = False

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """See `GenerationMetric`."""
        from sacrebleu import corpus_bleu

        most = max(map(len, references))
        columns = [[own[place] if place < len(own) else "" for own in references] for place in range(most)]
        return float(corpus_bleu(list(answers), columns).score) / 100

    @classmethod
    def check(cls) -> None:
        """See `GenerationMetric`."""
        try:
            import sacrebleu  # noqa: F401
        except ImportError:
            raise ConfigError(f"the metric bleu needs the package sacrebleu; {EXTRA}") from None


def normal(text: str) -> str:
    """A text as SQuAD's evaluation compares it, but that one is never left without a word: `A` may be an answer."""
    words = "".join(character for character in text.lower() if character not in set(string.punctuation))
    forms = (re.sub(r"\b(a|an|the)\b", " ", words), words, text.lower())
    return next((" ".join(form.split()) for form in forms if form.strip()), "")


def _f1(words: Sequence[str], others: Sequence[str]) -> float:
    if not words or not others:
        return float(words == others)
    shared = (Counter(words) & Counter(others)).total()
    return 2 * shared / (len(words) + len(others))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
