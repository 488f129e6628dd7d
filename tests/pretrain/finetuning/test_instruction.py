"""Instruction tuning: the loss is on the answers alone, one figure by every command and layout; a tiny decoder learns to answer;
and each mistake is told."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import comparison, runs, verify
from pretrain.config.objective import ObjectiveConfig, TemplateConfig
from pretrain.errors import UserError
from pretrain.finetuning.chat import PROMPT_CUT, RESPONSE_CUT
from pretrain.finetuning.examples import planes
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.responses import likeliest, written
from pretrain.finetuning.sequences import Format
from pretrain.finetuning.tasks import Sample
from pretrain.generate import Sampling, generate
from pretrain.loading import load_model
from pretrain.models.gpt import GPT
from pretrain.objectives.batch import Batch
from pretrain.objectives.labelled import Labelled
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.conversations import Conversation, Turn, read_conversations
from pretrain.tasks.labels import LabelSet
from pretrain.tasks.lines import Findings
from pretrain.tokenization.training import train_tokenizer
from pretrain.vocabulary import Vocabulary
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.finetuning import tiny

TOKENIZER = train_tokenizer([" ".join(tiny.WORDS) + " User: Assistant: return self import class\n"] * 20, 300)
EOS = TOKENIZER.eos
PLAIN = "User: {}\nAssistant: "
LAYOUTS = ("tp=2,sp", "cp=2", "pp=2,zero=1", "dp=2,zero=2")


def task(length: int = 64, **options: Any) -> Instruction:
    form = Format(TOKENIZER, Vocabulary(TOKENIZER.vocab_size, {"eos": EOS}), True, length, 0)
    return Instruction(ObjectiveConfig(kind="instruction", **options), form, LabelSet(()))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def sample(made: Instruction, *turns: tuple[str, str], findings: Findings | None = None) -> Sample:
    talk = Conversation(0, 3, tuple(Turn(role, text) for role, text in turns))
    return made.samples(0, talk, Path("a.jsonl"), findings or Findings())[0]


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_answers_and_their_ends_alone() -> None:
    """By hand: every position, what it sees, what it predicts, and whether that counts."""
    made = task()
    found = sample(
        made, ("system", "code"), ("user", "return"), ("assistant", "self value"), ("user", "x"), ("assistant", "path")
    )
    first, second = encode("code\n\n" + PLAIN.format("return")), encode(PLAIN.format("x"))
    one, other = [*encode("self value"), EOS], [*encode("path"), EOS]
    ids = [*first, *one, *second, *other]
    counted = [False] * len(first) + [True] * len(one) + [False] * len(second) + [True] * len(other)
    assert found.rows[0].ids.tolist() == ids[:-1]
    targets = [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)]
    assert found.targets.tolist() == targets[1:]

    short = sample(made, ("user", "x"), ("assistant", "name"))
    batch = Labelled("instruction", 1, 1, None, True)(
        torch.arange(2), torch.from_numpy(planes([found, short], 1, made.form))
    )
    assert isinstance(batch, Batch) and batch.documents is None
    assert batch.inputs[0, : len(ids) - 1].tolist() == ids[:-1]
    assert batch.mask[0, : len(ids) - 1].tolist() == [float(counts) for counts in counted[1:]]
    assert batch.mask.sum(dim=1).tolist() == [len(one) + len(other), len(encode("name")) + 1]
    right = batch.mask.bool()
    assert batch.targets[right].tolist() == [*one, *other, *encode("name"), EOS]


def test_a_model_is_asked_by_the_tokens_that_it_was_trained_on() -> None:
    made = task(template=TemplateConfig(user="Q {text} ", assistant="A {text}"))
    asked = sample(made, ("user", "return"))
    trained = sample(made, ("user", "return"), ("assistant", "self"))
    assert asked.rows[0].ids.tolist() == encode("Q return A ") == encode(made.chat.asked("return"))
    assert trained.rows[0].ids[: len(asked.rows[0].ids)].tolist() == asked.rows[0].ids.tolist()
    assert (asked.targets == IGNORED).all()


def test_the_beginning_is_cut_before_the_answer_is() -> None:
    made, findings = task(length=32), Findings()
    whole = sample(task(length=999), ("user", "path " * 40), ("assistant", "name"))
    found = sample(made, ("user", "path " * 40), ("assistant", "name"), findings=findings)
    assert len(found.rows[0].ids) == len(found.targets) == 32
    assert found.rows[0].ids.tolist() == whole.rows[0].ids[-32:].tolist()
    assert found.targets.tolist() == whole.targets[-32:].tolist() and found.targets[-1] == EOS
    assert findings.counts == {PROMPT_CUT: 1}


def test_an_answer_that_does_not_fit_is_cut_at_its_end_behind_the_templates_words() -> None:
    made, findings = task(length=32), Findings()
    found = sample(made, ("user", "path " * 40), ("assistant", "name " * 60), findings=findings)
    opening, answer = encode("Assistant: "), encode("name " * 60)
    assert (
        found.rows[0].ids.tolist() == encode(PLAIN.format("path " * 40))[-len(opening) :] + answer[: 32 - len(opening)]
    )
    assert found.targets[len(opening) - 1 :].tolist() == answer[: 33 - len(opening)]
    assert findings.counts == {PROMPT_CUT: 1, RESPONSE_CUT: 1}
    with pytest.raises(UserError, match=r"a\.jsonl:3: an answer longer than data\.seq_length.*without strict"):
        sample(made, ("user", "x"), ("assistant", "name " * 60), findings=Findings(strict=True))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_whatever_the_length_it_is_filled_and_something_counts(length: int) -> None:
    for turns in ([("user", "a")], [("system", "b"), ("user", "path " * 9), ("assistant", "c"), ("user", "d")]):
        for answer in ("x", "name " * 30):
            found = sample(task(length=length), *turns, ("assistant", answer))
            assert len(found.rows[0].ids) == len(found.targets) <= length
            assert (found.targets != IGNORED).any()
    asked = task(length=length, response_length=4)
    assert 1 <= len(sample(asked, ("user", "path " * 40)).rows[0].ids) <= max((length + 1) // 2, length - 4)


def test_the_floor_is_how_often_each_token_stands_in_trainings_answers() -> None:
    made = task()
    training = [
        Conversation(0, 1, (Turn("user", "a"), Turn("assistant", text))) for text in ("name name", "path", "name")
    ]
    held = [Conversation(0, 1, (Turn("user", "a"), Turn("assistant", "name item")))]
    answers = [token for item in training for token in [*encode(item.turns[1].text), EOS]]
    counts, total = Counter(answers), len(answers) + TOKENIZER.vocab_size
    wanted = [*encode("name item"), EOS]
    losses = [-math.log((counts[token] + 1) / total) for token in wanted]
    likely = max(range(TOKENIZER.vocab_size), key=lambda token: counts[token])
    found = made.floor(training, held)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["token_accuracy"] == pytest.approx(wanted.count(likely) / len(wanted)) and likely == EOS


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"user": "Q"}, "template.user: 'Q' has {text} 0 times"),
        ({"system": "{text}{text}"}, "template.system"),
        ({"assistant": "{text}</s>"}, "goes on after {text}"),
    ],
)
def test_a_template_has_each_text_once(template: dict[str, str], words: str) -> None:
    from pretrain.config.load import checked_config

    values = {"objective": {"kind": "instruction", "template": template}, "model": {"initial": "m"}}
    with pytest.raises(UserError) as error:
        checked_config(values, "x")
    assert words in str(error.value)


# -- runs --------------------------------------------------------------------------------------------------------------


class Tuned:
    """A finished run, made once."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.config = tiny.write_config(folder, "instruction", tiny.gpt(shards))
        ran = running.command("train", self.config, *FAST, *LONG, timeout=120)
        assert ran.code == 0, ran.told
        self.told = ran.out
        self.judged = [line for line in running.lines_of(self.run) if "validation_loss" in line]


FAST = ("optimizer.learning_rate=1e-2", "optimizer.betas=[0.9, 0.95]", "model.dropout=0")
LONG = (
    "monitor.sample_every=14 epochs",
    "monitor.sample_prompt=text import",
    "batch.micro_size=16",
    "schedule.warmup=1 epochs",
    "schedule.total=14 epochs",
    "monitor.validate_every=14 epochs",
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Tuned:
    return Tuned(tmp_path_factory.mktemp("instructed"), tiny_data)


def test_a_decoder_learns_to_answer_and_evaluate_gives_the_same_score(tuned: Tuned) -> None:
    first, last = tuned.judged[0], tuned.judged[-1]
    assert last["validation_token_accuracy"] > 0.99 > first["validation_token_accuracy"]
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    assert last["floor_validation_loss"] > last["validation_loss"] and "(without learning: loss " in tuned.told
    assert json.loads((tuned.run / "summary.json").read_text())["best_validation_loss"] == last["validation_loss"]
    assert "a text by the model:\n  | User: text import\n  | Assistant: " in tuned.told
    result = json.loads((tuned.run / "result.json").read_text())
    assert result["metric"] == "validation_loss" and result["floor"]["validation_loss"] == last["floor_validation_loss"]
    assert result["final"]["validation_token_accuracy"] == last["validation_token_accuracy"]
    for size in ("5", "64"):
        ran = running.command("evaluate", tuned.run, "--data", tuned.folder / "dev.jsonl", "--batch-size", size)
        assert ran.code == 0, ran.told
        found = json.loads(ran.out)
        for name in ("loss", "perplexity", "token_accuracy"):
            assert found[name] == pytest.approx(last[f"validation_{name}"], rel=1e-5)
            assert found[f"floor_{name}"] == pytest.approx(last[f"floor_validation_{name}"])
        assert found["examples"] == 21


def test_predict_writes_the_answers_and_generate_asks_alike(tuned: Tuned, tmp_path: Path) -> None:
    wanted = [item.turns[-1].text for item in read_conversations(tuned.folder / "dev.jsonl")]
    outs = []
    for size in ("1", "7"):
        out = tmp_path / f"{size}.jsonl"
        ran = running.command(
            "predict", tuned.run, "--input", tuned.folder / "dev.jsonl", "--out", out, "--batch-size", size
        )
        assert ran.code == 0, ran.told
        outs.append([json.loads(line) for line in out.read_text().splitlines()])
    found, other = outs
    assert [line["id"] for line in found] == list(range(21))
    assert [line["text"] for line in found] == [line["text"] for line in other] == wanted
    assert [line["score"] for line in found] == pytest.approx([line["score"] for line in other], abs=1e-5)
    assert all(-1 < line["score"] < 0 for line in found)
    plain = ("--temperature", "0", "--max-tokens", "9")
    ran = running.command("generate", tuned.run, "--prompt", "text import", *plain)
    assert ran.code == 0 and ran.out == "path\n", ran.told
    raw = running.command("generate", tuned.run, "--prompt", PLAIN.format("text import"), "--raw", *plain)
    assert raw.out == PLAIN.format("text import") + "path\n"


def test_what_is_written_is_the_greedy_text_whatever_is_asked_beside(tuned: Tuned) -> None:
    loaded = load_model(tuned.run)
    model, made = loaded.model, loaded.task
    assert isinstance(model, GPT) and isinstance(made, Instruction)
    asked = [f"{word} {other}" for word in tiny.WORDS[:5] for other in ("return", "self", "x")]
    samples = [
        made.samples(n, Conversation(n, n, (Turn("user", text),)), Path("a"), Findings())[0]
        for n, text in enumerate(asked)
    ]
    found = written(model, made, samples, 4)
    for place, one in enumerate(samples):
        prompt = one.rows[0].ids.tolist()
        most = model.max_length - len(prompt) + 1
        wanted = list(generate(model, prompt, most, Sampling(0), loaded.tokenizer.eos))
        ids = found[place][:, 0].astype(int).tolist()
        assert ids == [*wanted, loaded.tokenizer.eos][:most]
        logits = model.logits(torch.tensor([[*prompt, *ids[:-1]]]))[0, len(prompt) - 1 :].double().log_softmax(-1)
        chances = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert np.allclose(found[place][:, 1], chances.numpy(), atol=1e-4)
    cut = list(likeliest(model, torch.tensor([samples[0].rows[0].ids.tolist()]), 2, stop=-1))
    assert cut[0].shape == (2, 2)


@pytest.mark.thorough
def test_every_layout_trains_the_same(tuned: Tuned, tmp_path: Path) -> None:
    fields = [f"run.dir={tmp_path / 'run'}", "optimizer.epsilon=1e-5"]
    config = runs.open_config(str(tuned.config), fields, 1)
    sizes = (config.batch.micro_size, 8)
    one, other = (run_ranks(1, verify.trace, verify._alone(verify.with_micro(config, size)), 4)[0] for size in sizes)
    for layout in LAYOUTS:
        case = verify.case_of(config, layout)
        found = run_ranks(case.processes, verify.trace, case.config, 4)[0]
        compared = comparison.compare(layout, case.processes, one, found, comparison.spread(one, [other]))
        assert compared.same, f"{layout}: step {compared.step}: {compared.what} {compared.parameters}"


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2", ""])
def test_the_score_is_the_same_on_two_processes(layout: str, tuned: Tuned, tmp_path: Path, tiny_data: Path) -> None:
    config = tiny.write_config(tmp_path, "instruction", tiny.gpt(tiny_data))
    still = ("schedule.total=1 steps", "schedule.warmup=0 steps")
    ran = running.command("train", config, *FAST, *still, *filter(None, [layout]), world=2)
    assert ran.code == 0, ran.told
    found = next(line for line in running.lines_of(tmp_path / "run") if "validation_loss" in line)
    assert found == pytest.approx(tuned.judged[0], rel=1e-5)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"}', 'there is no "response"'),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "the role 'robot'"),
        (b'{"prompt": "a", "response": " "}', "the response is empty"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "the content of message 0 is empty"),
        (b'["a"]', "a JSON object is expected on each line, not a list"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(line: bytes, words: str, tmp_path: Path, tiny_data: Path) -> None:
    config = tiny.write_config(tmp_path, "instruction", tiny.gpt(tiny_data))
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n' + line + b"\n")
    ran = running.command("train", config)
    running.assert_refused(ran, f"{path}:2: ", words)


def test_an_encoder_answers_nothing(tmp_path: Path, tiny_data: Path) -> None:
    config = tiny.write_config(tmp_path, "instruction", tiny.bert(tiny_data))
    running.assert_refused(
        running.command("train", config), "instruction does not train a bert", "start from a decoder"
    )


def test_raw_is_refused_where_there_is_no_template(tiny_data: Path) -> None:
    ran = running.command("generate", tiny.gpt(tiny_data), "--prompt", "a", "--raw")
    running.assert_refused(ran, "--raw: has no effect")
