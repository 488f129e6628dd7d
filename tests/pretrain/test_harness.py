"""The adapter to lm-evaluation-harness against plain computations; with its own interface where it is installed, else with
as much of it as the adapter uses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import pretrain
from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.generate import Sampling, generate
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.huggingface.models import BERT, GPT2, write_run
from tests.pretrain.tokenization.samples import TEXTS, WORDS

LENGTH = 40
INSTALLED = importlib.util.find_spec("lm_eval") is not None


class Hook:
    """What lm-eval keeps of an evaluation that was stopped."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, name: str, arguments: Any, result: Any) -> None:
        self.kept.append((name, arguments, result))


def stand_in(calls: list[list[str]]) -> dict[str, ModuleType]:
    """The modules of lm-eval that the adapter imports."""

    class LM:
        def __init__(self) -> None:
            self.cache_hook = Hook()

    def register_model(*names: str) -> Callable[[type], type]:
        return lambda cls: cls

    parts = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")}
    parts["lm_eval.__main__"] = ModuleType("lm_eval.__main__")
    parts["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    parts["lm_eval.api.registry"].register_model = register_model  # type: ignore[attr-defined]
    parts["lm_eval.__main__"].cli_evaluate = lambda: calls.append(sys.argv)  # type: ignore[attr-defined]
    return parts


def forget(patch: pytest.MonkeyPatch) -> None:
    """The adapter is imported anew."""
    patch.delitem(sys.modules, "pretrain.harness", raising=False)
    patch.delattr(pretrain, "harness", raising=False)


@pytest.fixture(scope="module")
def calls() -> list[list[str]]:
    """The command lines that lm-eval was called with."""
    return []


@pytest.fixture(scope="module")
def harness(calls: list[list[str]]) -> Iterator[Any]:
    """The adapter's module."""
    with pytest.MonkeyPatch.context() as patch:
        if INSTALLED:
            patch.setattr("lm_eval.__main__.cli_evaluate", lambda: calls.append(sys.argv))
        for name, module in ({} if INSTALLED else stand_in(calls)).items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "argv", list(sys.argv))
        forget(patch)
        yield importlib.import_module("pretrain.harness")
        del sys.modules["pretrain.harness"], pretrain.harness  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "run"
    write_run(folder, {**GPT2, "initial_scale": 0.5}, tokenizer, length=LENGTH)
    return folder


@pytest.fixture(scope="module")
def model(harness: Any, run: Path) -> Any:
    found = harness.HarnessLM(run, batch_size="3")
    found.cache_hook = Hook()
    return found


def asked(*arguments: Any) -> Any:
    """A request, as far as a model looks at it."""
    return SimpleNamespace(args=arguments)


def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Each token by a pass of its own."""
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        logits = model.model.logits(torch.tensor([[*context, *continuation[:place]][-LENGTH:]]))[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
    return total, greedy


def test_likelihoods_and_greedy_flags_are_a_plain_computations(model: Any, tokenizer: Tokenizer) -> None:
    eos, encode = tokenizer.eos, tokenizer.encode
    pairs = [("the quick brown", " fox jumps"), ("the quick brown  ", "fox"), ("", "over a lazy dog"), ("a\n", "birds")]
    pairs += [("import", "fox"), ("  ", "dog"), ("the lazy dog sings " * 9, "over the fox")]
    expected = []
    for context, continuation in pairs:
        bare = context.rstrip()
        whole = encode(context + continuation)
        before = encode(bare) if bare else [eos]
        after = whole[len(encode(bare)) :]
        expected.append(plain(model, before[-(LENGTH + 1 - len(after)) :], after))
    for number in range(60):
        context = f"the {WORDS[number % 17]} jumps\nover {number} {WORDS[number * 7 % 17]}s"
        ids = encode(context)
        greedy = list(generate(model.model, ids, 2, Sampling(temperature=0), None))
        text = tokenizer.decode(greedy)
        if encode(context + text) == ids + greedy:
            pairs.append((context, text))
            expected.append((plain(model, ids, greedy)[0], True))
    found = model.loglikelihood([asked(*pair) for pair in pairs])
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert {flag for _, flag in found} == {True, False}
    kept = [("loglikelihood", pair, result) for pair, result in zip(pairs, found, strict=True)]
    assert model.cache_hook.kept[-len(pairs) :] == kept


def test_a_continuation_that_begins_inside_a_piece_is_scored(model: Any, tokenizer: Tokenizer) -> None:
    """Its beginning is one piece with the context's end: without this nothing would be left to score."""
    before = tokenizer.encode("the")
    whole = {word: tokenizer.encode(f"the {word}") for word in WORDS if word[:-1].isalpha()}
    word = next(
        word for word, ids in whole.items() if ids[:-1] == before and len(tokenizer.encode(f"the {word[:-1]}")) > 1
    )
    ((total, _),) = model.loglikelihood([asked(f"the {word[:-1]}", word[-1])])
    assert total == pytest.approx(plain(model, before, whole[word][-1:])[0], rel=1e-5)


@pytest.mark.parametrize("count", [1, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 3 * LENGTH - 7])
def test_a_rolling_likelihood_has_every_token_once(model: Any, tokenizer: Tokenizer, count: int) -> None:
    ids = tokenizer.encode(TEXTS[3] * 9)[:count]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    total = 0.0
    for place, token in enumerate(ids):
        window = place // LENGTH
        first = max(min((window + 1) * LENGTH, count) - LENGTH - 1, 0) if window else 0
        total += plain(model, ([] if window else [tokenizer.eos]) + ids[first:place], [token])[0]
    assert model.loglikelihood_rolling([asked(text), asked("dog")])[0] == pytest.approx(total, rel=1e-5)
    assert model.loglikelihood_rolling([asked("")]) == [0]


def test_text_goes_on_up_to_a_stop_text(model: Any, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the quick")
    ids = list(generate(model.model, prompt, 12, Sampling(temperature=0), tokenizer.eos))
    text = tokenizer.decode(ids)
    stop = text[len(text) // 2 :][:3]
    assert text and stop
    options = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    found = model.generate_until(
        [
            asked("the quick", options),
            asked("the quick", {**options, "until": [stop, "", "never there"]}),
            asked("the quick", {**options, "until": stop}),
            asked("the quick", {"until": [], "max_new_tokens": 2}),
        ]
    )
    assert found == [text, *[text[: text.index(stop)]] * 2, tokenizer.decode(ids[:2])]
    assert [name for name, _, _ in model.cache_hook.kept[-4:]] == ["generate_until"] * 4


def test_a_long_context_leaves_room_for_what_is_generated(model: Any, tokenizer: Tokenizer) -> None:
    context = TEXTS[5] * 3
    for max_tokens, room in ((5, LENGTH - 5), (LENGTH, LENGTH // 2)):
        ids = list(generate(model.model, tokenizer.encode(context)[-room:], max_tokens, Sampling(0), tokenizer.eos))
        (found,) = model.generate_until([asked(context, {"max_gen_toks": max_tokens})])
        assert found == tokenizer.decode(ids)


def test_what_is_drawn_depends_on_the_request_alone(model: Any) -> None:
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "top_k": 50, "max_gen_toks": 8}
    requests = [asked("the quick", options)] * 4
    found = model.generate_until(requests)
    assert len(set(found)) > 1 and found == model.generate_until(requests)


def test_options_of_generation(harness: Any) -> None:
    for options, expected in (
        ({}, (Sampling(0.0, 0, 1.0, 7), [], 256)),
        ({"do_sample": True}, (Sampling(1.0, 0, 1.0, 7), [], 256)),
        ({"do_sample": True, "temperature": 0.0}, (Sampling(0.0, 0, 1.0, 7), [], 256)),
        ({"temperature": 0.8, "top_p": 0.9, "until": "\n"}, (Sampling(0.8, 0, 0.9, 7), ["\n"], 256)),
        ({"max_tokens": 3, "max_gen_toks": 4, "do_sample": False}, (Sampling(0.0, 0, 1.0, 7), [], 4)),
    ):
        assert harness.generation_options(options, 7) == expected
    with pytest.raises(UserError, match=r"'repetition_penalty', 'num_beams': not known"):
        harness.generation_options({"repetition_penalty": 1.2, "num_beams": 4}, 0)


def test_the_document_end_stands_before_every_context_on_request(harness: Any, run: Path, tokenizer: Tokenizer) -> None:
    model = harness.HarnessLM(run, device="cpu" if torch.cuda.is_available() else "cuda:0", add_bos_token=True)
    ids = tokenizer.encode("the quick brown fox")
    size = len(tokenizer.encode("the quick"))
    expected = plain(model, [tokenizer.eos, *ids[:size]], ids[size:])
    ((total, _),) = model.loglikelihood([asked("the quick", " brown fox")])
    assert total == pytest.approx(expected[0], rel=1e-5)


def test_what_cannot_be_is_refused(harness: Any, model: Any, run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_run(tmp_path / "bert", BERT, tokenizer, name="bert masked")
    with pytest.raises(UserError, match="a bert does not continue texts"):
        harness.HarnessLM(tmp_path / "bert")
    for size in ("auto", 0, "auto:4", -1):
        with pytest.raises(UserError, match="--batch_size"):
            harness.HarnessLM(run, batch_size=size)
    with pytest.raises(UserError, match="--device abacus: give cpu"):
        harness.HarnessLM(run, device="abacus")
    with pytest.raises(UserError, match="--checkpoint 3"):
        harness.HarnessLM(run, checkpoint=3)
    with pytest.raises(UserError, match=f"more than the {LENGTH} that the model sees"):
        model.loglikelihood([asked("a", "7 " * 2 * LENGTH)])


def test_the_command_is_lm_evals_with_the_run_as_its_model(harness: Any, calls: list[list[str]]) -> None:
    words = ["--tasks", "a,b", "--num_fewshot", "5", "--limit", "10"]
    assert main(["harness", "runs/a,b=c", *words, "--checkpoint", "7"]) == 0
    assert calls[-1][:4] == ["lm-eval", "run", "--model", "pretrain"]
    assert calls[-1][4] == "--model_args" and json.loads(calls[-1][5]) == {"run": "runs/a,b=c", "checkpoint": 7}
    assert calls[-1][6:] == words


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_command_says_what_to_install(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
            patch.delitem(sys.modules, name)
        assert main(["harness", "runs/mine", "--tasks", "a"]) == 2
    assert "pip install 'pretrain-engine[harness]'" in capfd.readouterr().err
