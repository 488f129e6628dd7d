"""Metrics against other implementations: scikit-learn, scipy, and the published definitions written out anew."""

from __future__ import annotations

import itertools
import math
import random
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.tasks.answers import AnswerScores, Row, scored
from pretrain.tasks.classes import ClassCounts
from pretrain.tasks.correlation import NumberPairs, average_ranks
from pretrain.tasks.entities import EntityCounts
from pretrain.tasks.floors import commonest, gazetteer, gazetteer_tags, overlap_answer
from pretrain.tasks.trials import expected_best, mean, share_failed, standard_deviation

near = pytest.approx
CLASS_PAIRS = st.integers(2, 5).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), min_size=1, max_size=40))
)


@settings(max_examples=150, deadline=None)
@given(CLASS_PAIRS)
def test_accuracy_f1_and_matthews_are_scikit_learns(case: tuple[int, list[tuple[int, int]]]) -> None:
    num_classes, pairs = case
    gold, predicted = zip(*pairs, strict=True)
    counts = ClassCounts.of(gold, predicted, num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without examples
        assert counts.accuracy == near(sklearn.metrics.accuracy_score(gold, predicted))
        assert counts.macro_f1 == near(sklearn.metrics.f1_score(gold, predicted, average="macro", zero_division=0))
        assert counts.matthews == near(sklearn.metrics.matthews_corrcoef(gold, predicted))
        if num_classes == 2:
            assert counts.f1() == near(sklearn.metrics.f1_score(gold, predicted, zero_division=0))


@settings(deadline=None)
@given(CLASS_PAIRS, st.integers(0, 40))
def test_class_counts_add_up_over_shards(case: tuple[int, list[tuple[int, int]]], cut: int) -> None:
    num_classes, pairs = case
    parts = [ClassCounts.of([g for g, _ in p], [x for _, x in p], num_classes) for p in (pairs[:cut], pairs[cut:])]
    whole = ClassCounts.of(*zip(*pairs, strict=True), num_classes)
    added = sum(parts, ClassCounts.none(num_classes))
    assert (added.table == whole.table).all() and added.matthews == whole.matthews


def test_matthews_of_very_many_examples_does_not_overflow() -> None:
    counts = ClassCounts(np.array([[3, 1], [1, 3]], np.int64) * 10**12)
    assert counts.matthews == near(0.5)


def test_classes_out_of_range_are_an_error_of_the_program() -> None:
    for gold, predicted in (([2], [0]), ([0], [-1]), ([0, 1], [0])):
        with pytest.raises(ValueError, match=r"classes|predictions"):
            ClassCounts.of(gold, predicted, 2)


NUMBERS = st.integers(-3, 3).map(float) | st.floats(-100, 100).map(lambda value: round(value, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_correlations_are_scipys_whatever_the_order_and_the_shards(pairs: list[tuple[float, float]], luck: Any) -> None:
    gold, predicted = (list(side) for side in zip(*pairs, strict=True))
    found = NumberPairs.of(gold, predicted)
    assert average_ranks(np.array(gold)) == near(scipy.stats.rankdata(gold))
    if len(set(gold)) == 1 or len(set(predicted)) == 1:
        assert math.isnan(found.pearson) and math.isnan(found.spearman)
    else:
        assert found.pearson == near(scipy.stats.pearsonr(gold, predicted).statistic, abs=1e-9)
        assert found.spearman == near(scipy.stats.spearmanr(gold, predicted).statistic, abs=1e-9)
        luck.shuffle(pairs)
        parts = [NumberPairs.of([g for g, _ in p], [x for _, x in p]) for p in (pairs[::2], pairs[1::2])]
        added = sum(parts, NumberPairs.of())
        assert (added.pearson, added.spearman) == (found.pearson, found.spearman)


def test_a_prediction_that_is_not_finite_has_no_correlation() -> None:
    pairs = NumberPairs.of([1, 2, 3], [1, math.nan, 2])
    assert math.isnan(pairs.pearson) and math.isnan(pairs.spearman)
    assert NumberPairs.of([1e300, -1e300], [1e-300, -1e-300]).pearson == near(1)


# -- entities --------------------------------------------------------------------------------------------------------


def conlleval_chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """By the rules of conlleval.pl: startOfChunk and endOfChunk on each pair of neighbours."""
    found, start = set(), 0
    padded = ["O", *tags, "O"]
    for place, (before, tag) in enumerate(itertools.pairwise(padded)):
        (old, old_type), (new, new_type) = ((t[0], t[2:]) for t in (before, tag))
        if old != "O" and (new in "OB" or old_type != new_type):
            found.add((old_type, start, place))
        if new == "B" or (new == "I" and (old == "O" or old_type != new_type)):
            start = place
    return found


def iob2_chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Spans that are B-X followed by I-X and by no further I-X, found by trying all."""
    size = len(tags)
    return {
        (tags[a][2:], a, b)
        for a in range(size)
        for b in range(a + 1, size + 1)
        if tags[a][0] == "B"
        and all(tag == f"I-{tags[a][2:]}" for tag in tags[a + 1 : b])
        and (b == size or tags[b] != f"I-{tags[a][2:]}")
    }


TAGS = st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"])
TAGGED = st.lists(st.lists(st.tuples(TAGS, TAGS), max_size=8), min_size=1, max_size=5)


@pytest.mark.parametrize("strict", [False, True])
@given(TAGGED)
def test_entity_scores_are_those_of_the_published_rules(strict: bool, sentences: list[list[tuple[str, str]]]) -> None:
    gold, predicted = ([[pair[side] for pair in s] for s in sentences] for side in (0, 1))
    chunks = iob2_chunks if strict else conlleval_chunks
    truth, guess = ({(n, *c) for n, s in enumerate(side) for c in chunks(s)} for side in (gold, predicted))
    found = EntityCounts.of(gold, predicted, strict)
    for kind in ("x", "y", None):
        t, g = ({c for c in side if kind in (None, c[1])} for side in (truth, guess))
        scores = found.by_type().get(kind) if kind else found.micro
        if scores is None:
            assert not t and not g
            continue
        precision, recall = len(t & g) / len(g) if g else 0, len(t & g) / len(t) if t else 0
        f1 = 2 * precision * recall / (precision + recall) if t & g else 0
        assert (scores.precision, scores.recall, scores.f1, scores.gold) == near((precision, recall, f1, len(t)))
    halves = [EntityCounts.of(gold[a:b], predicted[a:b], strict) for a, b in ((0, 2), (2, None))]
    assert sum(halves, EntityCounts()) == found


SEQEVAL = [  # gold, predicted, then precision, recall, F1 as seqeval 1.2.2 gives them: by default, then strict IOB2
    ("O I-x I-x O", "O B-x I-x O", (1, 1, 1), (0, 0, 0)),
    ("B-x I-y O B-y", "B-x I-x O I-y", (0.5, 1 / 3, 0.4), (0, 0, 0)),
    ("B-x B-x I-x O I-y", "B-x I-x I-x O B-y", (0.5, 1 / 3, 0.4), (0, 0, 0)),
    ("B-x I-x O B-y I-y I-x", "B-x I-x O B-y I-y O", (1, 2 / 3, 0.8), (1, 1, 1)),
    ("O O", "O O", (0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize(("gold", "predicted", "default", "strict"), SEQEVAL)
def test_entity_scores_are_seqevals(
    gold: str, predicted: str, default: Sequence[float], strict: Sequence[float]
) -> None:
    for is_strict, expected in ((False, default), (True, strict)):
        scores = EntityCounts.of([gold.split()], [predicted.split()], is_strict).micro
        assert (scores.precision, scores.recall, scores.f1) == near(tuple(expected))


def test_a_sentence_with_other_than_a_tag_a_token_is_no_score() -> None:
    with pytest.raises(ValueError, match="1 predicted tags for 2 tokens"):
        EntityCounts.of([["O", "O"]], [["O"]])


# -- answers: the official scripts' definitions ----------------------------------------------------------------------


def official_normalise(s: str) -> str:
    lower = s.lower()
    kept = "".join(c for c in lower if c not in set(string.punctuation))
    return " ".join(re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", kept).split())


def official_f1(prediction: str, truth: str, version_2: bool) -> float:
    guess, gold = official_normalise(prediction).split(), official_normalise(truth).split()
    same = sum((Counter(guess) & Counter(gold)).values())
    if version_2 and (len(gold) == 0 or len(guess) == 0):
        return float(gold == guess)
    if same == 0:
        return 0.0
    precision, recall = 1.0 * same / len(guess), 1.0 * same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def official_threshold(predictions: list[str], scores: list[float], odds: list[float], answerable: list[bool]) -> Any:
    current = sum(1 for has in answerable if not has)
    best, threshold = float(current), 0.0
    for n in sorted(range(len(odds)), key=lambda k: odds[k]):
        current += scores[n] if answerable[n] else (-1 if predictions[n] else 0)
        if current > best + 1e-12:
            best, threshold = current, odds[n]
    return 100.0 * best / len(scores), threshold


WORD = st.sampled_from(["the", "a", "an", "The", "cat", "Cat.", "cat's", "dog", "2,000", "—", "é", "!", "", "anthem"])
PHRASE = st.lists(WORD, max_size=4).map(" ".join)


@given(st.lists(st.tuples(PHRASE, st.lists(PHRASE, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_exact_match_and_f1_are_squads(cases: list[tuple[str, list[str]]]) -> None:
    for version_2 in (False, True):
        exact, f1, found = [], [], AnswerScores()
        for prediction, gold in cases:
            kept = ([g for g in gold if official_normalise(g)] or [""]) if version_2 else gold
            exact.append(max(float(official_normalise(prediction) == official_normalise(g)) for g in kept))
            f1.append(max(official_f1(prediction, g, version_2) for g in kept))
            found += scored(prediction, gold, version_2)
        assert found.exact == near(100 * sum(exact) / len(exact))
        assert found.f1 == near(100 * sum(f1) / len(f1))


QUESTIONS = st.lists(
    st.tuples(st.sampled_from(["", "cat", "dog"]), st.sampled_from([[], ["cat"], ["cat dog"]])), min_size=1, max_size=10
)


@given(QUESTIONS, st.randoms(use_true_random=False))
def test_the_best_threshold_is_the_official_scripts(cases: list[tuple[str, list[str]]], luck: random.Random) -> None:
    odds = luck.sample([n / 64 for n in range(1, 64)], len(cases))
    parts = [scored(p, gold, True, odd) for (p, gold), odd in zip(cases, odds, strict=True)]
    total = sum(parts, AnswerScores())
    predictions, answerable = [p for p, _ in cases], [bool(gold) for _, gold in cases]
    for best, scores in (
        (total.best_exact(), [r.exact for r in total.rows]),
        (total.best_f1(), [r.f1 for r in total.rows]),
    ):
        score, threshold = official_threshold(predictions, scores, odds, answerable)
        assert best.score == near(score) and best.threshold == threshold
    luck.shuffle(parts)
    again = sum(parts, AnswerScores())
    assert (again.f1, again.exact, again.best_f1()) == (total.f1, total.exact, total.best_f1())


@given(QUESTIONS, st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0]), min_size=10, max_size=10))
@example([("cat", []), ("dog", ["cat"])], [-2.0] * 10)
def test_the_best_threshold_reaches_what_it_says_among_ties_and_negative_scores(
    cases: list[tuple[str, list[str]]], odds: list[float]
) -> None:
    total = sum((scored(p, g, True, odd) for (p, g), odd in zip(cases, odds, strict=False)), AnswerScores())
    best = total.best_f1()
    assert total.at(best.threshold).f1 == near(best.score)
    assert best.score >= max(total.at(odd).f1 for odd in (-3.0, -2.0, -1.0, 0.0, 1.0)) - 1e-9


def test_scores_with_and_without_answer_are_apart() -> None:
    total = AnswerScores((Row(1, 1, True, True, 0), Row(0, 0.5, True, True, 0), Row(0, 0, False, True, 0)))
    assert (total.only(True).f1, total.only(False).exact) == (75, 0)
    assert math.isnan(AnswerScores().f1) and math.isnan(AnswerScores().best_f1().score)


# -- several runs, floors --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=4), st.integers(1, 4))
def test_expected_best_is_the_mean_over_all_draws(values: list[float], n: int) -> None:
    draws = list(itertools.product(values, repeat=n))
    assert expected_best(values, n) == near(sum(map(max, draws)) / len(draws))
    assert mean(values) == near(np.mean(values)) == expected_best(values, 1)
    if len(values) > 1:
        assert standard_deviation(values) == near(np.std(values, ddof=1))


def test_what_no_run_gave_has_no_figure() -> None:
    assert standard_deviation([3.0]) is None
    assert share_failed([0.5, 0.51, 0.52, math.nan], 0.5) == 0.75
    for values in ([], [math.nan]):
        with pytest.raises(ValueError, match="finite"):
            expected_best(values, 2)


def test_floors_are_the_commonest_class_and_tag_and_the_words_in_common() -> None:
    assert commonest(["b", "a", "b", "a"]) == "a"
    table = gazetteer([(("New", "York"), ("B-loc", "I-loc")), (("New",), ("O",)), (("New",), ("B-loc",))])
    assert gazetteer_tags(table, ["York", "New", "York", "x"]) == ("B-loc", "B-loc", "I-loc", "O")
    context = "The cat sat on a mat. The dog was found in Paris, by chance."
    assert overlap_answer("Where was the dog found?", context) in context
    assert overlap_answer("Where was the dog found?", context) == "Paris"
