"""What the model learns to predict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from parallel.layout import Problem
from pretrain.config.section import Section, meaning

PRETRAINING = {  # objective -> the model that it trains
    "causal": "gpt",
    "masked": "bert",
    "sequence-to-sequence": "encoder-decoder",
    "span-corruption": "encoder-decoder",
    "prefix": "encoder-decoder",
}
TASKS = ("classification", "regression", "multiple-choice", "tagging", "question-answering")  # with a head of their own
LABELLED = (*TASKS, "instruction")  # on labelled examples; the last with the decoder's own head over the vocabulary
ROLES = ("system", "user", "assistant")  # pretrain.tasks.conversations
TEXT = "{text}"  # in a template, where a message stands
OF_KINDS: dict[str, tuple[str, ...]] = {  # objectives -> the fields that are theirs alone
    "causal": ("loss_across_documents",),
    "masked": ("mask_rate", "masking", "mask_share", "random_share", "span_probability", "span_limit", "pairs"),
    "span-corruption": ("noise_rate", "noise_span", "sentinels"),
    "prefix": ("prefix_share",),
    "sequence-to-sequence": ("source_length",),
    "classification tagging": ("labels", "class_weights"),
    "question-answering": ("version_2", "question_length", "answer_length", "best"),
    "tagging question-answering": ("overlap",),
    "classification regression": ("texts", "label"),
    "instruction": ("template", "response_length"),
    " ".join(LABELLED): ("strict",),
    "causal masked span-corruption prefix": ("attention_across_documents",),
    "causal masked span-corruption prefix sequence-to-sequence instruction": ("z_loss",),
}


class TemplateConfig(Section):
    """How a conversation is written: each message's text, of its role, in place of {text}."""

    system: str = meaning("{text}\n\n", "of the message that may stand first")
    user: str = meaning("User: {text}\n", "of what is asked")
    assistant: str = meaning("Assistant: {text}", "of an answer, which a document's end follows")

    def problems(self) -> Iterator[Problem]:
        for role in ROLES:
            count = getattr(self, role).count(TEXT)
            if count != 1:
                yield Problem(role, f"{getattr(self, role)!r} has {TEXT} {count} times", "write it once")
        if not self.assistant.endswith(TEXT):
            mend = "end it with {text}: a document's end stands behind it and ends the answer"
            yield Problem("assistant", f"{self.assistant!r} goes on after {TEXT}", mend)


class ObjectiveConfig(Section):
    """The training objective."""

    kind: Literal[
        "causal",
        "masked",
        "span-corruption",
        "prefix",
        "sequence-to-sequence",
        "classification",
        "regression",
        "multiple-choice",
        "tagging",
        "question-answering",
        "instruction",
    ] = meaning(
        "causal",
        "on text causal (GPT), masked (BERT), span-corruption or prefix (encoder-decoder); on pairs sequence-to-sequence; on "
        "labelled examples classification, regression, multiple-choice, tagging, question-answering or instruction (GPT)",
    )
    loss_across_documents: bool = meaning(
        True, "causal: whether a document's first token, predicted from the one before, counts"
    )
    attention_across_documents: bool = meaning(
        True,
        "whether a token sees the documents before its own in the sequence; if not, positions begin anew with each",
    )
    mask_rate: float = meaning(0.15, "masked: share of a sequence's tokens that are predicted", gt=0, lt=1)
    masking: Literal["token", "word", "span"] = meaning(
        "token", "masked: token, word (all pieces of a word together) or span (of tokens, SpanBERT's lengths)"
    )
    mask_share: float = meaning(0.8, "masked: share of those that are replaced by the mask", ge=0, le=1)
    random_share: float = meaning(
        0.1, "masked: share of those that are replaced by any token; the rest stay", ge=0, le=1
    )
    span_probability: float = meaning(0.2, "masked, span: p of the geometric distribution of lengths", gt=0, lt=1)
    span_limit: int = meaning(10, "masked, span: the longest, in tokens", ge=1)
    pairs: Literal["none", "next", "order"] = meaning(
        "none", "masked: predict of two segments whether the second follows (next, BERT) or they are swapped (order)"
    )
    noise_rate: float = meaning(
        0.15, "span-corruption: share of a sequence's tokens that the target has (T5)", gt=0, lt=1
    )
    noise_span: float = meaning(3.0, "span-corruption: mean length of the spans, in tokens", ge=1)
    sentinels: int = meaning(100, "span-corruption: ids that stand for spans, behind the tokenizer's", ge=1)
    prefix_share: float = meaning(
        0.5, "prefix: share of a sequence that the encoder reads; the decoder predicts the rest", gt=0, lt=1
    )
    source_length: int | None = meaning(
        None, "sequence-to-sequence: tokens of data.seq_length that are a row's sources; null: half of them", ge=1
    )
    labels: list[str] | None = meaning(
        None, "classification: the classes in the order of the outputs; null: those of the training file, sorted"
    )
    class_weights: list[float] | Literal["balanced"] | None = meaning(
        None, "classification, tagging: weight of each class's examples in the loss; balanced: by their numbers"
    )
    texts: list[str] | None = meaning(
        None, "classification, regression: columns of one or two texts; null: all but label and id"
    )
    label: str = meaning("label", "classification, regression: the label's column")
    overlap: int = meaning(
        32, "tagging, question-answering: tokens that two windows over a longer text have in common", ge=0
    )
    version_2: bool = meaning(False, "question-answering: some questions have no answer (SQuAD v2)")
    question_length: int = meaning(64, "question-answering: tokens of a question at most; what is beyond is cut", ge=1)
    answer_length: int = meaning(30, "question-answering: tokens of an answer at most", ge=1)
    best: int = meaning(20, "question-answering: spans of a window that are considered", ge=1)
    template: TemplateConfig = meaning(
        TemplateConfig(), "instruction: how messages are written, {text} being theirs; kept with the run"
    )
    response_length: int = meaning(256, "instruction: tokens of a response that predict writes, at most", ge=1)
    strict: bool = meaning(False, "labelled examples: what could be mended or left out, and counted, is an error")
    label_smoothing: float = meaning(
        0.0, "share of each target that is spread over the whole vocabulary; in training alone", ge=0, lt=1
    )
    z_loss: float = meaning(
        0.0, "factor of each target's squared logarithm of the softmax's denominator; in training alone", ge=0
    )

    @property
    def is_task(self) -> bool:
        """Whether it learns from labelled examples."""
        return self.kind in LABELLED

    @property
    def has_head(self) -> bool:
        """Whether its model has a head of the task's in place of one over the vocabulary."""
        return self.kind in TASKS

    def predicted(self, length: int) -> int:
        """The most places of a sequence of `length` that are predicted."""
        if self.kind == "masked":
            return max(1, math.ceil(self.mask_rate * length))
        return length if PRETRAINING.get(self.kind) != "encoder-decoder" else self.lengths(length)[1]

    def spans(self, length: int) -> tuple[int, int]:
        """Span corruption of `length` tokens: how many are the target's, in how many spans (Raffel et al. 2020, T5's code:
        at least one of either, and of the others, between any two spans)."""
        noise = min(max(round(length * self.noise_rate), 1), length - 1)
        return noise, min(max(round(noise / self.noise_span), 1), noise, length - noise)

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens of an encoder-decoder's source and target, of a sample of `length` tokens."""
        if self.kind == "span-corruption":  # a sentinel a span in either, and an end
            noise, spans = self.spans(length)
            return length - noise + spans + 1, noise + spans + 1
        if self.kind == "prefix":
            source = min(max(round(length * self.prefix_share), 1), length - 1)
        else:
            source = self.source_length or length // 2
        return source, length - source

    def problems(self) -> Iterator[Problem]:
        for kinds, names in OF_KINDS.items():
            for name in names if self.kind not in kinds.split() else ():
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    mend = f"remove it, or set kind: {' or '.join(kinds.split())}"
                    yield Problem(name, f"{value} has no effect with kind: {self.kind}", mend)
        if self.mask_share + self.random_share > 1:
            found = f"{self.mask_share} and random_share {self.random_share} are more than 1 together"
            yield Problem("mask_share", found, "BERT's are 0.8 and 0.1")
        if self.masking != "span":
            for name in ("span_probability", "span_limit"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield Problem(
                        name, f"has no effect with masking: {self.masking}", "remove it, or set masking: span"
                    )
        if self.pairs != "none" and not self.attention_across_documents:
            found = "false would keep the segments of a pair apart"
            yield Problem("attention_across_documents", found, "set it true, or pairs: none")
