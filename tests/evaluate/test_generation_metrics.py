"""Scores of generated text; numbers by hand, or by the packages that define them."""

import pytest
from sacrebleu.metrics import BLEU

from fedhpc.registry import GENERATION_METRICS


def score(name, answers, references):
    return GENERATION_METRICS[name]().score(answers, references)


def test_exact_match_takes_no_notice_of_what_squad_takes_none_of():
    answers = ["The  Red house.", "red houses", "blue"]
    references = [["a red house", "no"], ["red house"], ["green", "Blue!"]]
    assert score("exact_match", answers, references) == pytest.approx(2 / 3)


def test_token_f1_counts_shared_words_with_the_nearest_reference():
    # Two of three words are shared with one of two: 2 * 2 / (3 + 2); nothing with nothing is alike.
    assert score("token_f1", ["red big house", ""], [["big red", "sea"], [""]]) == pytest.approx((0.8 + 1) / 2)
    assert score("token_f1", ["red"], [["blue"]]) == 0


@pytest.mark.parametrize("name", ["exact_match", "token_f1"])
@pytest.mark.parametrize(("reference", "wrong"), [("A", ["", "The", "?", "B"]), ("!", ["", "?", "the"])])
def test_a_reference_of_nothing_but_an_article_or_punctuation_is_not_the_empty_answer(name, reference, wrong):
    """Choices have letters: SQuAD's rules leave nothing of `A`, and nothing of an answer that says nothing."""
    assert score(name, wrong, [[reference]] * len(wrong)) == 0
    assert score(name, [f"{reference.lower()} "], [[reference]]) == 1


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "the cat sat" against "the big cat sat down": 3 common words of 3 and 5.
    assert score("rouge_l", ["the cat sat"], [["the big cat sat down"]]) == pytest.approx(0.75)
    assert score("rouge_l", ["the cat sat"], [["nothing", "the cat sat"]]) == 1


def test_bleu_is_of_all_texts_together_against_all_references_of_each():
    answers = ["the cat sat on the mat today", "a dog barked at the old tree"]
    references = [["the cat sat on the mat", "the cat was on the mat today"], ["a dog barked at an old tree"]]
    expected = BLEU().corpus_score(answers, [[own[0] for own in references], [references[0][1], None]]).score
    assert score("bleu", answers, references) == pytest.approx(expected / 100)
    assert score("bleu", answers, [[answer] for answer in answers]) == pytest.approx(1)
