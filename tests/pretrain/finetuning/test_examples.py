"""Sequences as pre-training had them, an order that uses every sample once, and tasks whose right outputs score perfectly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.objective import TASKS, ObjectiveConfig
from pretrain.data.stream import batch_hash
from pretrain.finetuning import stdlib
from pretrain.finetuning.examples import GROUP, POOL, Examples, ExampleStream, GroupedOrder, planes
from pretrain.finetuning.judging import predicted
from pretrain.finetuning.opening import KINDS, class_weights
from pretrain.finetuning.sequences import Format
from pretrain.finetuning.tasks import Sample, Task
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.labelled import read_classified
from pretrain.tasks.lines import Findings
from pretrain.tokenization.training import train_tokenizer
from pretrain.vocabulary import Vocabulary
from tests.pretrain.finetuning import tiny

TOKENIZER = train_tokenizer([" ".join(tiny.WORDS) + " return self import class what ends?"] * 20, 300)
VOCABULARY = Vocabulary(TOKENIZER.vocab_size, {**TOKENIZER.special, "eos": TOKENIZER.eos})
CLS, SEP, EOS = (VOCABULARY.special[name] for name in ("cls", "sep", "eos"))


def form(length: int = 32, causal: bool = False, segments: int = 2) -> Format:
    return Format(TOKENIZER, VOCABULARY, causal, length, segments)


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_an_encoders_pair_is_berts() -> None:
    found = form().joined([[10, 11, 12], [20, 21]])
    assert found.ids.tolist() == [CLS, 10, 11, 12, SEP, 20, 21, SEP]
    assert found.segments.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert found.begins == (1, 5) and found.truncated == 0
    assert form(segments=0).joined([[1], [2]]).segments.tolist() == [0] * 5


def test_a_decoders_texts_each_end() -> None:
    found = form(causal=True, segments=0).joined([[10, 11], [20]])
    assert found.ids.tolist() == [10, 11, EOS, 20, EOS] and found.begins == (0, 3)


@pytest.mark.parametrize(
    "lengths", [(40,), (40, 3), (3, 40), (20, 21), (30, 30), (100, 1), (29, 0), (15, 14), (16, 14)]
)
def test_the_longer_text_is_cut_as_transformers_cuts_it(lengths: tuple[int, ...]) -> None:
    """Token by token from the longer one, of equal ones the second: the `longest_first` of its tokenizers."""
    wanted = list(lengths)
    room = 32 - 1 - len(lengths)
    while sum(wanted) > room:
        longest = max(range(len(wanted)), key=lambda place: wanted[place])
        wanted[longest] -= 1
    found = form().joined([list(range(count)) for count in lengths])
    assert len(found.ids) == sum(wanted) + 1 + len(lengths) <= 32
    assert found.truncated == sum(lengths) - sum(wanted)
    kept = np.diff([*found.begins, len(found.ids)]) - 1
    assert sorted(kept.tolist()) == sorted(wanted) and abs(kept - wanted).max() <= 1


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 31, 32, 33, POOL - 1, POOL, POOL + 1, 3 * POOL + 77])
def test_an_epoch_is_every_sample_once_in_another_order(count: int) -> None:
    lengths = np.random.default_rng(1).integers(3, 100, count)
    order = GroupedOrder(lengths, seed=7)
    epochs = [order.locate(np.arange(epoch * count, (epoch + 1) * count))[1] for epoch in range(3)]
    for places in epochs:
        assert sorted(places.tolist()) == list(range(count))
    assert count < 40 or not np.array_equal(epochs[0], epochs[1])
    again = GroupedOrder(lengths, seed=7).locate(np.array([2 * count, 0, count]))[1]
    assert again.tolist() == [epochs[2][0], epochs[0][0], epochs[1][0]], "a number by itself is the same"
    assert count < 40 or not np.array_equal(GroupedOrder(lengths, seed=8).locate(np.arange(count))[1], epochs[0])


def test_batches_hold_samples_of_like_length_but_come_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(1).integers(3, 100, 10 * POOL)
    places = GroupedOrder(lengths, seed=1).locate(np.arange(10 * POOL))[1]
    groups = lengths[places].reshape(-1, GROUP)
    padded, shuffled = groups.max(axis=1).sum() * GROUP, lengths.reshape(-1, GROUP).max(axis=1).sum() * GROUP
    assert padded < 1.1 * lengths.sum() < shuffled
    assert abs(np.corrcoef(np.arange(len(groups)), groups.mean(axis=1))[0, 1]) < 0.2


# -- tasks -------------------------------------------------------------------------------------------------------------


def opened(kind: str, folder: Path, length: int = 32, **options: Any) -> tuple[Task, Examples]:
    if kind in ("tagging", "question-answering"):
        options = {"overlap": 8, **options}
    config = ObjectiveConfig(kind=kind, **options)
    path, findings = tiny.write(folder, kind, "train", 60), Findings()
    items = list(KINDS[kind].read(config, path, True, findings))
    task = KINDS[kind](config, form(length), KINDS[kind].labels_of(config, path, items, findings))
    return task, Examples.read(task, path, items, findings)


def right(task: Task, sample: Sample) -> np.ndarray:
    """The outputs (P, C) of a model that knows the targets; what it is not told it says at random."""
    kind, draw = task.config.kind, np.random.default_rng(sample.item)
    if kind == "regression":
        return sample.targets.view(np.float64)[:, None]
    if kind == "multiple-choice":
        return (np.arange(task.num_rows) == sample.targets[0])[:, None] * 5.0
    if kind == "question-answering":
        scores = np.zeros((32, 2))
        scores[sample.targets, [0, 1]] = 9.0 if sample.targets.any() else 1.0
        return scores
    scores = draw.normal(size=(len(sample.targets), task.num_outputs))
    known = sample.targets != IGNORED
    scores[known, sample.targets[known]] = 9.0
    return scores


@pytest.mark.parametrize("kind", TASKS)
def test_right_outputs_score_perfectly_over_windows_too(kind: str, tmp_path: Path) -> None:
    task, examples = opened(kind, tmp_path)
    outputs = {place: right(task, sample) for place, sample in enumerate(examples.samples)}
    lines = list(predicted(task, examples.items, examples.samples, outputs))
    assert task.metrics(examples.items, lines)[task.metric] == pytest.approx(1.0)
    windows = {sample.item for sample in examples.samples if sample.window > 0}
    assert (len(windows) > 3) == (kind in ("tagging", "question-answering"))
    floor = task.floor(examples.items, examples.items)
    assert all(value < 1 for value in floor.values())
    # One wrong answer is seen.
    place = next(place for place, sample in enumerate(examples.samples) if sample.targets.any())
    spoiled = list(predicted(task, examples.items, examples.samples, {**outputs, place: -outputs[place][:, ::-1]}))
    assert task.metrics(examples.items, spoiled)[task.metric] < 1.0


def test_planes_hold_every_row_padded(tmp_path: Path) -> None:
    task, examples = opened("multiple-choice", tmp_path)
    some = examples.samples[:5]
    found = planes(some, task.num_rows, task.form)
    widest = max(len(row.ids) for sample in some for row in sample.rows)
    assert found.shape[1:] == (3 * task.num_rows, task.form.width(widest))
    for sample, plane in zip(some, found, strict=True):
        for number in range(task.num_rows):
            ids = sample.rows[number].ids if number < len(sample.rows) else np.empty(0, np.int64)
            assert plane[3 * number, : len(ids)].tolist() == ids.tolist()
            assert (plane[3 * number, len(ids) :] == -1).all()
        assert plane[2, 0] == sample.targets[0] and (plane[2, 1:] == IGNORED).all()


def test_a_stream_is_known_by_what_decides_its_samples(tmp_path: Path) -> None:
    task, examples = opened("classification", tmp_path)
    stream = ExampleStream(task, examples, 3)
    assert stream.fingerprint == ExampleStream(task, examples, 3).fingerprint
    assert stream.fingerprint != ExampleStream(task, examples, 4).fingerprint
    fewer = examples._replace(samples=examples.samples[:-1])
    assert stream.fingerprint != ExampleStream(task, fewer, 3).fingerprint
    numbers = np.arange(20)
    whole = stream.gather(*stream.order.locate(numbers))
    part = stream.gather(*stream.order.locate(numbers[7:9]))
    width = part.shape[2]
    assert np.array_equal(part, whole[7:9, :, :width])
    assert width < whole.shape[2], "else the hash's independence of it is not tried"
    assert batch_hash(numbers[7:9], stream.unpadded(part)) == batch_hash(numbers[7:9], stream.unpadded(whole[7:9]))
    assert batch_hash(numbers[7:9], part) != batch_hash(numbers[7:9], whole[7:9])
    for sample, place in zip(stream.unpadded(whole), stream.order.locate(numbers)[1].tolist(), strict=True):
        assert sample.shape[1] == max(len(examples.samples[place].rows[0].ids), 1)


def test_widths_are_few_close_and_shared_by_the_ranks() -> None:
    alone, eight = (Format(TOKENIZER, VOCABULARY, False, 400, 0, parts) for parts in (1, 8))
    widths = [alone.width(longest) for longest in range(1, 401)]
    assert len(set(widths)) < 60 and all(0 <= width - longest <= longest / 8 for longest, width in enumerate(widths, 1))
    assert widths[27] == 28 and widths[99] == 104 and widths[399] == 400 and alone.width(450) == 450
    assert all(eight.width(longest) % 8 == 0 for longest in range(1, 401))


def test_balanced_weights_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    task, examples = opened("classification", tmp_path, class_weights="balanced")
    labels = [sample.targets[0] for sample in examples.samples]
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(task, examples) == pytest.approx(wanted.tolist())


def test_texts_that_are_cut_and_tokens_without_pieces_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    draw = random.Random(1)
    path.write_text(
        "label\ttext\n" + "".join(f"{'ab'[n % 2]}\t{' '.join(draw.choices(tiny.WORDS, k=60))}\n" for n in range(4))
    )
    config, findings = ObjectiveConfig(kind="classification"), Findings()
    items = list(KINDS["classification"].read(config, path, True, findings))
    task = KINDS["classification"](config, form(), KINDS["classification"].labels_of(config, path, items, findings))
    Examples.read(task, path, items, findings)
    assert findings.counts == {"a text longer than the model's sequence, cut": 4}


def test_every_machine_can_make_a_labelled_set(tmp_path: Path) -> None:
    train, dev = stdlib.write(tmp_path)
    read = {part: list(read_classified(tmp_path / f"{part}.tsv")) for part in ("train", "dev")}
    assert (len(read["train"]), len(read["dev"])) == (train, dev) and train > 1000 and dev > 250
    texts = {part: {item.texts for item in items} for part, items in read.items()}
    assert not texts["train"] & texts["dev"]
    labels = [{item.label for item in items} for items in read.values()]
    assert labels[0] == labels[1] and len(labels[0]) >= 6
