"""Pieces, words, windows and answers fit each other, whatever the text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tasks.alignment import (
    IGNORED,
    NO_WORD,
    Array,
    assembled,
    first_pieces,
    joined,
    owners,
    passage_room,
    piece_targets,
    windows,
    word_tags,
    words_of_pieces,
)
from pretrain.tasks.spans import Span, best_spans, merged, span_of_answer, text_of_span, within

TOKENS = st.lists(st.text("ab ", max_size=4), min_size=1, max_size=8)


def cut(text: str, cuts: list[int], leading: bool) -> tuple[Array, Array]:
    """Pieces of the text as a tokenizer makes them: cut at spaces, which lead the next piece or belong to none, and at
    the given places."""
    places = {0, len(text), *(place % (len(text) + 1) for place in cuts)}
    places |= {n for n, character in enumerate(text) if character == " "}
    if not leading:
        places |= {n + 1 for n, character in enumerate(text) if character == " "}
    pairs = [(a, b) for a, b in itertools.pairwise(sorted(places)) if leading or text[a:b] != " "]
    return np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64)


@given(TOKENS, st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_every_word_with_a_character_gets_its_tag_back_and_others_o(
    tokens: list[str], cuts: list[int], lead: bool
) -> None:
    text, word_starts, word_ends = joined(tokens)
    assert [text[a:b] for a, b in zip(word_starts, word_ends, strict=True)] == tokens
    starts, ends = cut(text, cuts, lead)
    first = first_pieces(words_of_pieces(starts, ends, word_starts, word_ends), len(tokens))
    tags = list(range(1, len(tokens) + 1))
    targets = piece_targets(first, tags, len(starts))
    names = ["O", *(f"B-{n}" for n in tags)]
    expected = [name if token.strip() else None for name, token in zip(names[1:], tokens, strict=True)]
    found = word_tags(first, np.maximum(targets, 0), names)
    assert len(found) == len(tokens)
    for tag, name, piece in zip(found, expected, first, strict=True):
        assert tag == name or (name is None and (piece >= 0 or tag == "O"))
    assert (targets != IGNORED).sum() == (first >= 0).sum()


def test_bytes_spaces_and_empty_words_are_aligned() -> None:
    text, word_starts, word_ends = joined(["a", "", "éb"])
    assert text == "a  éb"
    starts, ends = np.array([0, 1, 2, 3, 3, 4]), np.array([1, 2, 3, 3, 4, 5])  # a, space, space, byte, byte of é, b
    words = words_of_pieces(starts, ends, word_starts, word_ends)
    assert words.tolist() == [0, NO_WORD, NO_WORD, NO_WORD, 2, 2]
    first = first_pieces(words, 3)
    assert first.tolist() == [0, -1, 4]
    assert piece_targets(first, [5, 6, 7], 6).tolist() == [5, IGNORED, IGNORED, IGNORED, 7, IGNORED]
    assert word_tags(first, [1, 0, 0, 0, 1, 0], ["O", "B-x"]) == ["B-x", "O", "B-x"]
    assert words_of_pieces(starts, ends, word_starts[:0], word_ends[:0]).tolist() == [NO_WORD] * 6


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 19))
def test_windows_cover_all_pieces_and_each_is_predicted_once(size: int, length: int, overlap: int) -> None:
    assume(overlap < length)
    found = windows(size, length, overlap)
    assert found[0][0] == 0 and found[-1][1] == size
    assert all(end - start <= length for start, end in found)
    for (_, end), (start, _) in itertools.pairwise(found):
        assert end - start == overlap
    assert len(found) == len({end for _, end in found}), "no window lies in another"
    values = [np.arange(start, end) for start, end in found]
    assert assembled(found, values, size).tolist() == list(range(size))
    owner = owners(found, size)
    for piece in range(size):
        context = [min(piece - a, b - 1 - piece) if a <= piece < b else -1 for a, b in found]
        assert owner[piece] == int(np.argmax(context))


def test_a_question_that_leaves_no_room_is_told_with_its_place() -> None:
    assert passage_room("a.json:3", 20, 3, 384, 128) == 361
    with pytest.raises(UserError, match=r"^a\.json:3: the question has 300 word pieces, which leave 81 of"):
        passage_room("a.json:3", 300, 3, 384, 128)
    with pytest.raises(ValueError, match="overlap"):
        windows(10, 4, 4)


TEXT = st.text("ab  é,", min_size=1, max_size=30).filter(str.strip)
CUTS = st.lists(st.integers(0, 40), max_size=8)


@given(TEXT, CUTS, st.booleans(), st.data())
def test_an_answer_of_whole_pieces_is_recovered_exactly_from_every_window(
    text: str, cuts: list[int], lead: bool, data: st.DataObject
) -> None:
    starts, ends = cut(text, cuts, lead)
    first = data.draw(st.integers(0, len(starts) - 1))
    last = data.draw(st.integers(first, len(starts) - 1))
    start, end = text_of_span(text, starts, ends, first, last)
    gold = text[start:end]
    assume(gold)
    assert gold == gold.strip()
    span = span_of_answer(starts, ends, start, end)
    assert span is not None
    for window in windows(len(starts), 5, 2):
        if (inside := within(span, window)) is None:
            assert span[0] < window[0] or span[1] >= window[1]
            continue
        scores = np.full((2, window[1] - window[0]), -5.0)
        scores[0, inside[0]] = scores[1, inside[1]] = 5.0
        spans = best_spans(scores[0], scores[1], 3, 30)
        assert merged(text, starts, ends, [(window, spans, 0.0)], 1).answer() == gold


@given(TEXT, CUTS, st.booleans(), st.data())
def test_any_answer_is_covered_by_its_pieces_and_by_no_fewer(
    text: str, cuts: list[int], lead: bool, data: st.DataObject
) -> None:
    starts, ends = cut(text, cuts, lead)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    span = span_of_answer(starts, ends, start, end)
    if not text[start:end].strip():
        return
    assert span is not None
    found = text_of_span(text, starts, ends, *span)
    assert text[start:end].strip() in text[slice(*found)]
    assert ends[span[0]] > start and starts[span[1]] < end


SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12)


@given(SCORES, st.integers(1, 8), st.integers(1, 14))
def test_the_best_spans_are_those_of_trying_all(scores: list[tuple[int, int]], num: int, longest: int) -> None:
    size = len(scores)
    tried = [
        Span(float(scores[a][0] + scores[b][1]), a, b) for a in range(size) for b in range(a, min(size, a + longest))
    ]
    expected = sorted(tried, key=lambda span: (-span.score, span.first, span.last))[:num]
    begins, finishes = (np.array(side, np.float64) for side in zip(*scores, strict=True))
    assert best_spans(begins, finishes, num, longest) == expected


def test_masked_and_broken_scores_give_no_answer() -> None:
    masked = np.full(4, -np.inf)
    assert best_spans(masked, masked, 5, 3) == [] and best_spans(masked[:0], masked[:0], 5, 3) == []
    with pytest.raises(ValueError, match="not numbers"):
        best_spans(np.array([np.nan]), np.array([1.0]), 5, 3)
    nothing = merged("ab", np.array([0]), np.array([2]), [((0, 1), [], 1.0)], 5)
    assert nothing.answer() == "" and nothing.no_answer == float("inf")


def test_windows_merge_into_one_list_of_answers() -> None:
    text, starts, ends = "one two three", np.array([0, 3, 7]), np.array([3, 7, 13])
    found = merged(
        text,
        starts,
        ends,
        [((0, 2), [Span(5, 1, 1), Span(1, 0, 0)], 3.0), ((1, 3), [Span(6, 0, 0), Span(2, 0, 1)], 4.0)],
        2,
    )
    assert [(c.text, c.score) for c in found.candidates] == [("two", 6), ("two three", 2)]
    assert found.no_answer == -3 and found.answer() == "two"
    assert found.answer(threshold=-3.5) == "" and found.answer(threshold=-3) == "two"
