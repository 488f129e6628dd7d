"""Beam search against every text that there is, a search of plain lists that never ends early, and transformers' own."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import noise
from pretrain.beams import Hypothesis, beam_search
from pretrain.errors import UserError
from pretrain.generate import Continuation, Sampling, check_options, generate
from pretrain.loading import load_model
from pretrain.models.gpt import GPT
from tests.pretrain import running
from tests.pretrain.models.references import GPT2_SHAPE, as_gpt2, load, make_gpt2, weights_of
from tests.pretrain.test_generate import LENGTH, PROMPT, VOCAB, small_gpt

EOS = 2
Found = list[tuple[list[int], float]]


class Prefixes:
    """A step without a model: chances are a function of all that stands before."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size, self.seed = vocab_size, seed
        self.prefixes: list[list[int]] = [[]]

    def chances(self, prefix: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(noise.key(self.seed, *prefix))
        return (2 * torch.randn(self.vocab_size, generator=generator)).log_softmax(-1)

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = zip(self.prefixes, tokens.tolist(), strict=True)
        self.prefixes = [prefix + row for prefix, row in rows]
        return torch.stack([self.chances(prefix) for prefix in self.prefixes])

    def reorder(self, index: Tensor) -> None:
        self.prefixes = [self.prefixes[i] for i in index.tolist()]


class Uncached(Prefixes):
    """A model's step that remembers ids alone; the windows past its length are those of `generate`."""

    def __init__(self, model: GPT) -> None:
        super().__init__(VOCAB)
        self.model = model

    def chances(self, prefix: Sequence[int]) -> Tensor:
        seen: list[int] = []
        for token in prefix:
            seen = [*seen, token]
            if len(seen) > self.model.max_length:
                seen = seen[-(self.model.max_length // 2) :]
        return self.model.logits(torch.tensor([seen]))[0, -1].log_softmax(-1)


def penalty(length: int, alpha: float) -> float:
    return float((5 + length) ** alpha / 6**alpha)


def every_text(step: Prefixes, start: list[int], length: int, alpha: float) -> Found:
    """All texts up to the length with their scores, the best first."""
    found: Found = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(step.vocab_size), repeat=size):
            ends = EOS in tokens
            if size == length if not ends else tokens.index(EOS) == size - 1:
                total = sum(step.chances([*start, *tokens[:place]])[token].item() for place, token in enumerate(tokens))
                found.append((list(tokens[:-1] if ends else tokens), total / penalty(size, alpha)))
    return sorted(found, key=lambda item: -item[1])


def plain_search(step: Prefixes, beams: int, start: list[int], length: int, alpha: float) -> Found:
    """The rules of the search alone: no caches, no early end."""
    running: Found = [([], 0.0)]
    done: Found = []
    for size in range(1, length + 1):
        extended = [
            ([*tokens, token], total + chance)
            for tokens, total in running
            for token, chance in enumerate(step.chances([*start, *tokens]).tolist())
        ]
        extended.sort(key=lambda item: -item[1])
        done += [(tokens[:-1], total / penalty(size, alpha)) for tokens, total in extended[:beams] if tokens[-1] == EOS]
        running = [item for item in extended if item[0][-1] != EOS][:beams]
    done += [(tokens, total / penalty(length, alpha)) for tokens, total in running]
    return sorted(done, key=lambda item: -item[1])


def assert_same(found: list[Hypothesis], expected: Found) -> None:
    assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], rel=1e-5)


# -- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_texts(alpha: float) -> None:
    for seed in range(3):
        expected = every_text(Prefixes(3, seed), [1], 4, alpha)
        assert len({score for _, score in expected}) == len(expected) == 2**4 + 1 + 2 + 4 + 8
        found = beam_search(Prefixes(3, seed), 16, [1], 4, EOS, alpha, num_best=7)
        assert_same(found, expected[:7])
        assert {hypothesis.finished for hypothesis in found} == {True, False} or alpha == 0


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_the_early_end_changes_nothing(beams: int, alpha: float) -> None:
    early = 0
    for seed in range(6):
        step = Prefixes(7, seed)
        expected = plain_search(Prefixes(7, seed), beams, [4, 4], 12, alpha)
        for num_best in (1, beams):
            assert_same(beam_search(Prefixes(7, seed), beams, [4, 4], 12, EOS, alpha, num_best), expected[:num_best])
        beam_search(step, beams, [4, 4], 12, EOS, alpha)
        early += len(step.prefixes[0]) < 2 + 11
    assert early or alpha == 2, "no search ended early"


def test_a_score_is_the_log_probability_over_the_length_penalty() -> None:
    (best,) = beam_search(Prefixes(7, 1), 3, [4], 12, EOS, 0.6)
    text = [*best.tokens, EOS] if best.finished else best.tokens
    total = sum(Prefixes(7, 1).chances([4, *text[:place]])[token].item() for place, token in enumerate(text))
    assert best.finished and len(text) > 1
    assert best.log_probability == pytest.approx(total, rel=1e-6)
    assert best.score == pytest.approx(total / ((5 + len(text)) / 6) ** 0.6, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_one_beam_is_greedy(alpha: float) -> None:
    ended = 0
    for seed in range(20):
        step, expected = Prefixes(7, seed), [3]
        while len(expected) < 9 and (token := int(step.chances(expected).argmax())) != EOS:
            expected.append(token)
        (found,) = beam_search(step, 1, [3], 8, EOS, alpha)
        assert found.tokens == expected[1:]
        ended += found.finished
    assert 5 < ended < 20


class Fixed:
    """The same chances after every text."""

    def __init__(self, *chances: float) -> None:
        self.row = torch.tensor(chances).log()

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.row.expand(len(tokens), -1)

    def reorder(self, index: Tensor) -> None:
        pass


def test_of_equally_likely_tokens_the_lowest_ids_come_first() -> None:
    found = beam_search(Fixed(*[0.01] * 100), 3, [7], 2, None, num_best=3)
    assert [hypothesis.tokens for hypothesis in found] == [[0, 0], [1, 0], [2, 0]]
    assert not any(hypothesis.finished for hypothesis in found)
    assert [h.tokens for h in beam_search(Fixed(0.2, 0.3, 0.2, 0.3), 2, [0], 1, None, num_best=2)] == [[1], [3]]


def test_the_impossible_is_never_found() -> None:
    found = beam_search(Fixed(0.0, 0.5, 0.5, 0.0), 8, [0], 3, EOS, num_best=8)
    assert [(h.tokens, h.finished) for h in found] == [([], True), ([1], True), ([1, 1], True), ([1, 1, 1], False)]
    assert [h.tokens for h in beam_search(Fixed(0.0, 0.0, 1.0), 4, [0], 5, EOS, num_best=4)] == [[]]


def test_a_search_that_cannot_be_is_refused() -> None:
    for beams, start, length, alpha, best in (
        (0, [1], 1, 0, 0),
        (2, [1], 1, 0, 3),
        (2, [], 1, 0, 1),
        (2, [1], 0, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"num_best|start"):
            beam_search(Fixed(1.0), beams, start, length, EOS, alpha, best)
    with pytest.raises(ValueError, match="length penalty"):
        beam_search(Fixed(1.0), 2, [1], 1, EOS, -1.0)


# -- with a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_with_the_cache_it_is_as_from_the_whole_prefix(positions: str) -> None:
    """Far past the model's length as well."""
    options: dict[str, Any] = {"num_kv_heads": 2, "attention_window": [6, None], "tie_embeddings": False}
    model = small_gpt(positions=positions, **options)
    for beams, max_tokens, prompt in ((4, 40, PROMPT), (3, 9, list(range(30)))):
        found = beam_search(Continuation(model), beams, prompt, max_tokens, None, num_best=beams)
        cut = prompt[-model.max_length :]
        expected = beam_search(Uncached(model), beams, cut, max_tokens, None, num_best=beams)
        assert_same(found, [(hypothesis.tokens, hypothesis.score) for hypothesis in expected])
        assert len({tuple(hypothesis.tokens[:-1]) for hypothesis in found}) > 1, "one hypothesis alone runs on"


def test_it_finds_what_transformers_finds() -> None:
    ours = small_gpt(**GPT2_SHAPE)
    theirs = make_gpt2(ours.config, VOCAB, LENGTH).eval()
    load(theirs, as_gpt2(weights_of(ours)))
    ends = 0
    for place, start in itertools.product((1, 3, 6), ([7], [1, 2, 3], PROMPT)):
        eos = list(generate(ours, start, 8, Sampling(temperature=0), None))[place]  # where greedy search would end
        prompt, length = torch.tensor([start]), LENGTH - len(start)
        options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "early_stopping": "never"}
        options |= {"max_new_tokens": length, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        rows = [row[len(start) :] for row in made.sequences.tolist()]
        expected = [row[: row.index(eos)] if eos in row else row for row in rows]
        found = beam_search(Continuation(ours), 4, start, length, eos, num_best=4)
        assert_same(found, list(zip(expected, made.sequences_scores.tolist(), strict=True)))
        ends += sum(hypothesis.finished for hypothesis in found)
    assert 9 < ends < 36, "texts that end and texts that are cut"


def test_more_beams_find_no_worse_than_greedy() -> None:
    model, better = small_gpt(), 0
    for first in range(12):
        greedy = list(generate(model, [first], 12, Sampling(temperature=0), EOS))
        one, several = (beam_search(Continuation(model), beams, [first], 12, EOS)[0] for beams in (1, 6))
        assert one.tokens == greedy
        assert several.score > one.score - 1e-4
        better += several.score > one.score + 1e-4
    assert better > 3


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_best_text(tiny_data: Path) -> None:
    run = running.trained(tiny_data)
    loaded = load_model(run)
    assert isinstance(loaded.model, GPT)
    tokenizer, prompt = loaded.tokenizer, loaded.tokenizer.encode("def ")
    for extra, alpha in (((), 0.6), (("--length-penalty", "2"), 2.0)):
        ran = running.command("generate", run, "--prompt", "def ", "--max-tokens", "9", "--beams", "3", *extra)
        (best,) = beam_search(Continuation(loaded.model), 3, prompt, 9, tokenizer.eos, alpha)
        assert (ran.code, ran.err, ran.out) == (0, "", f"def {tokenizer.decode(best.tokens)}\n"), ran.told


def options(**given: Any) -> Namespace:
    names = ("temperature", "top_k", "top_p", "seed", "num_samples", "beams", "length_penalty")
    return Namespace(**{**dict.fromkeys(names), "max_tokens": 5, **given})


def test_options_without_effect_are_refused() -> None:
    for good in ({"beams": 1}, {"beams": 4, "length_penalty": 0.0}, {"temperature": 0.0, "seed": 2}):
        check_options(options(**good))
    drawn = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 1, "num_samples": 1}
    with pytest.raises(
        UserError, match="--temperature, --top-k, --top-p, --seed, --num-samples: no effect with --beams"
    ):
        check_options(options(beams=4, **drawn))
    for wrong, words in (
        ({"length_penalty": 0.6}, "--length-penalty: .* give --beams"),
        ({"beams": 1, "length_penalty": 0.6}, "no effect with --beams 1"),
        ({"beams": 0}, "--beams 0: give at least 1"),
        ({"beams": 4, "length_penalty": -0.5}, "--length-penalty -0.5: give 0"),
        ({"beams": 4, "length_penalty": float("nan")}, "--length-penalty nan: give 0"),
        ({"beams": 4, "num_samples": 3}, "--num-samples: no effect"),
    ):
        with pytest.raises(UserError, match=words):
            check_options(options(**wrong))
