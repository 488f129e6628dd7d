"""Tasks that a language model does untrained (Brown et al. 2020, section 2.4): what it is asked, and with which examples.

Multiple choice as `choices.py` reads it: the context, then "Question: ..." and "Answer:" where there is a question, and
one of the choices. Cloze as `pairs.py` reads it: the source, and the target that must follow. Between the two stands one
space, unless the file has white space there. Examples stand before it, solved, each followed by a blank line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.tasks.choices import Choice, read_choices
from pretrain.tasks.lines import fail, read_json_lines
from pretrain.tasks.pairs import SOURCE, TARGET, Pair, read_pairs
from pretrain.tasks.tables import is_json_lines, split_cells

ANSWER = "Answer:"


@dataclass(frozen=True, slots=True)
class Item:
    """One task. `id`: row number from 0; continuations: of a cloze its target alone; answer: which is right."""

    id: int
    line: int
    prompt: str
    continuations: tuple[str, ...]
    answer: int

    @property
    def solved(self) -> str:
        """The prompt and its answer."""
        return joined(self.prompt, self.continuations[self.answer])


def read_items(path: str | Path) -> tuple[bool, list[Item]]:
    """Whether the file is multiple choice (else cloze), and its items. Raises UserError with file and line."""
    if _has_choices(path):
        return True, [_choice(item) for item in read_choices(path)]
    return False, [_cloze(pair) for pair in read_pairs(path)]


def _has_choices(path: str | Path) -> bool:
    if not is_json_lines(path):
        _, cells = next(split_cells(path), (1, [""]))
        return any(re.fullmatch(r"choice\d+", cell.strip()) for cell in cells)
    line, values = next(read_json_lines(path))
    if "choices" not in values and not {SOURCE, TARGET} <= values.keys():
        forms = 'give {"question", "choices": [...], "answer"} or {"source", "target"}'
        fail(path, line, f"neither multiple choice nor cloze; {forms}")
    return "choices" in values


def _choice(item: Choice) -> Item:
    question = f"Question: {item.question}\n{ANSWER}" if item.question else ""
    prompt = "\n".join(filter(None, (item.context, question)))
    assert item.answer is not None, "read with labels"
    return Item(item.id, item.line, prompt, item.choices, item.answer)


def _cloze(pair: Pair) -> Item:
    assert pair.target is not None, "read with labels"
    return Item(pair.id, pair.line, pair.source, (pair.target,), 0)


def context_of(item: Item, examples: Sequence[Item]) -> str:
    """The examples and the item's prompt."""
    return "".join(f"{example.solved}\n\n" for example in examples) + item.prompt


def joined(prompt: str, continuation: str) -> str:
    """The two as one text."""
    return prompt + continued(prompt, continuation)


def continued(prompt: str, continuation: str) -> str:
    """The continuation with the space before it, where there is no white space yet."""
    return continuation if prompt[-1:].isspace() or continuation[:1].isspace() else f" {continuation}"
