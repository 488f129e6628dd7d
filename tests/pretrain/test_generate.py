"""Generation against recomputing everything, transformers' own, and brute force over the choices of a token."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.errors import UserError
from pretrain.generate import Sampling, check_options, choose, generate, sample_text, stream_text
from pretrain.models.gpt import GPT
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.models.references import (
    GPT2_SHAPE,
    LLAMA_SHAPE,
    as_gpt2,
    as_llama,
    load,
    make_gpt,
    make_gpt2,
    make_llama,
    weights_of,
)

VOCAB, LENGTH = 40, 16
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "initial_scale": 0.4,
}
PROMPT = [3, 1, 4, 1, 5]
SAMPLINGS = (Sampling(temperature=0), Sampling(), Sampling(0.7, top_k=5, top_p=0.9, seed=3))


def small_gpt(length: int = LENGTH, **options: Any) -> GPT:
    return make_gpt(ModelConfig(**{**SMALL, **options}), VOCAB, length).eval()


def without_cache(model: GPT, prompt: list[int], max_tokens: int, sampling: Sampling) -> list[int]:
    """Every token from its whole prefix; past the model's length from the last half of what it saw."""
    ids, made = prompt[-model.max_length :], []
    for place in range(max_tokens):
        if len(ids) > model.max_length:
            ids = ids[-(model.max_length // 2) :]
        made.append(choose(model.logits(torch.tensor([ids]))[0, -1], sampling, place))
        ids = [*ids, made[-1]]
    return made


# -- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", "none"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_with_the_cache_it_is_as_from_the_whole_prefix(positions: str, sampling: Sampling) -> None:
    """Far past the model's length as well."""
    options = {"num_kv_heads": 2, "attention_window": [6, None], "tie_embeddings": False}
    model = small_gpt(positions=positions, **options)
    found = list(generate(model, PROMPT, 40, sampling, stop=None))
    assert len(found) == 40
    assert len(set(found)) > 1, "a model that repeats itself shows nothing"
    assert found == without_cache(model, PROMPT, 40, sampling)


def test_greedy_text_is_that_of_transformers() -> None:
    options = {"max_new_tokens": LENGTH - len(PROMPT), "do_sample": False, "pad_token_id": 0}
    for shape, make, convert in ((GPT2_SHAPE, make_gpt2, as_gpt2), (LLAMA_SHAPE, make_llama, as_llama)):
        config = ModelConfig(**{**SMALL, **shape})
        ours, theirs = small_gpt(**shape), make(config, VOCAB, LENGTH).eval()
        load(theirs, convert(weights_of(ours)))
        prompt = torch.tensor([PROMPT])
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
        assert PROMPT + list(generate(ours, PROMPT, options["max_new_tokens"], Sampling(0), None)) == expected


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("prompt", [[7], list(range(20))])
def test_a_short_model_goes_on_after_a_long_prompt(length: int, prompt: list[int]) -> None:
    model = small_gpt(length)
    assert len(list(generate(model, prompt, 10, Sampling(), stop=None))) == 10


def test_it_ends_before_the_stop_token() -> None:
    model = small_gpt()
    found = list(generate(model, PROMPT, 30, Sampling(), stop=None))
    stop = found[7]
    ended = list(generate(model, PROMPT, 30, Sampling(), stop=stop))
    assert ended == found[: found.index(stop)]


def test_the_seed_alone_decides_the_text() -> None:
    model = small_gpt()
    texts = [tuple(generate(model, PROMPT, 20, Sampling(seed=seed), None)) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    torch.manual_seed(99)
    assert tuple(generate(model, PROMPT, 20, Sampling(seed=1), None)) == texts[0]


# -- the choice of a token -------------------------------------------------------------------------------------------


def brute_force(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """Token: its probability, by lists and loops."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    powers = {token: math.exp((logits[token] - logits.max()).item() / sampling.temperature) for token in ranked}
    total = sum(powers.values())
    kept: dict[int, float] = {}
    for token in ranked:
        if sampling.top_p < 1 and sum(kept.values()) >= sampling.top_p:
            break
        kept[token] = powers[token] / total
    return {token: probability / sum(kept.values()) for token, probability in kept.items()}


LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, -4.0, 0.9, 1.7, -0.2, 0.31, 2.2])


@pytest.mark.parametrize("logits", [LOGITS, torch.zeros(10), LOGITS.bfloat16().round()])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(top_k=1),
        Sampling(top_k=4),
        Sampling(top_k=1000),
        Sampling(top_p=0.001),
        Sampling(top_p=0.63),
        Sampling(0.8, top_k=6, top_p=0.8),
    ],
)
def test_tokens_come_as_often_as_brute_force_says(logits: Tensor, sampling: Sampling) -> None:
    expected, draws = brute_force(logits, sampling), 1500
    found = Counter(choose(logits, sampling, place) for place in range(draws))
    assert set(found) <= set(expected)
    for token, probability in expected.items():
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(found[token] / draws - probability) <= 5 * error, token


def test_temperature_zero_takes_the_likeliest() -> None:
    for place in range(20):
        assert choose(LOGITS, Sampling(temperature=0, seed=place), place) == 9


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)])
def test_the_highest_draw_takes_no_token_that_was_cut_away(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that float32 rounds to 1."""
    logits = torch.cat((LOGITS, torch.full((5,), -200.0)))
    for key, place in ((2**31 - 1, -1), (0, 0)):
        monkeypatch.setattr("kernels.noise.key", lambda *parts, key=key: key)
        assert choose(logits, sampling, 0) == list(brute_force(LOGITS, sampling))[place]


# -- text as it comes --------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of bytes."""

    eos = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A real one, which has to spell what it never saw in bytes."""
    return train_tokenizer(["the cat sat on the mat, and that was that. " * 20], vocab_size=300)


TEXT = "the naïve café: 日本 😀 é\n\tthat"


def test_no_part_of_a_character_is_ever_shown(pieces: Tokenizer) -> None:
    for tokenizer in (Bytes(), pieces):
        shown = list(stream_text(tokenizer, iter(tokenizer.encode(TEXT))))  # type: ignore[arg-type]
        assert "".join(shown) == TEXT
        assert "\ufffd" not in "".join(shown)
        assert len(shown) > 20


def test_a_character_is_shown_with_its_last_byte() -> None:
    ids, pulled = "a😀b".encode(), []

    def tokens() -> Iterator[int]:
        for token in ids:
            pulled.append(token)
            yield token

    seen = [(text, len(pulled)) for text in stream_text(Bytes(), tokens())]  # type: ignore[arg-type]
    assert seen == [("a", 1), ("😀", 5), ("b", 6)]


@pytest.mark.parametrize("ids", [b"ab\xe6\x97", b"a\xffb", b"a\xef\xbf\xbd", b"a\xef\xbf\xbdb\xff\xff", b"", b"\x80"])
def test_bytes_that_never_become_a_character_are_shown_as_such(ids: bytes) -> None:
    assert "".join(stream_text(Bytes(), iter(ids))) == ids.decode(errors="replace")  # type: ignore[arg-type]


def test_a_sample_is_the_prompt_and_the_models_text(pieces: Tokenizer) -> None:
    model = make_gpt(ModelConfig(**SMALL), pieces.vocab_size, LENGTH).eval()
    for prompt in ("the cat", ""):
        ids = pieces.encode(prompt) or [pieces.eos]
        expected = prompt + pieces.decode(list(generate(model, ids, 12, Sampling(seed=4), pieces.eos)))
        assert sample_text(model, pieces, prompt, 12, Sampling(seed=4)) == expected


def test_all_that_is_wrong_with_the_options_is_told_at_once() -> None:
    names = ("temperature", "top_p", "top_k", "seed", "num_samples", "beams", "length_penalty")
    given = dict.fromkeys(names)
    check_options(Namespace(max_tokens=1, **given))
    with pytest.raises(UserError) as error:
        check_options(Namespace(**{**given, "temperature": -1.0, "top_p": 0.0, "top_k": -2, "max_tokens": 0}))
    for word in ("--temperature -1.0", "--top-p 0.0", "--top-k -2", "--max-tokens"):
        assert word in str(error.value)
