"""Instructions: conversations whose assistant turns are learned, from JSON lines.

{"messages": [{"role": "system" | "user" | "assistant", "content"}, ...]} or {"prompt", "response"}, in any mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tasks.lines import checked_text, excerpt, fail, kind_of, read_json_lines
from pretrain.tasks.tables import is_json_lines

ROLES = ("system", "user", "assistant")
MAX_TURNS = 10_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: who speaks and what."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """`id`: row number from 0. The last turn is the assistant's, or for prediction the user's."""

    id: int
    line: int
    turns: tuple[Turn, ...]


def read_conversations(path: str | Path, labelled: bool = True) -> Iterator[Conversation]:
    """Conversations of the file; without labels a last answer is cut off. Raises UserError with file and line."""
    if not is_json_lines(path):
        fail(path, 1, "instructions are read from JSON lines; name the file .jsonl, one JSON object a line")
    for number, (line, value) in enumerate(read_json_lines(path)):
        turns = (
            _messages(path, line, value["messages"]) if "messages" in value else _prompt(path, line, value, labelled)
        )
        yield Conversation(number, line, _checked(path, line, turns, labelled))


def _prompt(path: str | Path, line: int, value: dict[str, Any], labelled: bool) -> list[Turn]:
    for name in ("prompt", "response")[: 1 + labelled]:
        if name not in value:
            fail(path, line, f'there is no "{name}"; give {{"messages": [...]}} or {{"prompt", "response"}}')
    turns = [Turn("user", checked_text(path, line, "the prompt", value["prompt"]))]
    if labelled:
        turns.append(Turn("assistant", checked_text(path, line, "the response", value["response"])))
    return turns


def _messages(path: str | Path, line: int, value: Any) -> list[Turn]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TURNS:
        fail(path, line, f'"messages" must be a list of 1 to {MAX_TURNS:,} messages; mend the line')
    return [_turn(path, line, number, message) for number, message in enumerate(value)]


def _turn(path: str | Path, line: int, number: int, message: Any) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        found = "one without them" if isinstance(message, dict) else kind_of(message)
        fail(path, line, f'message {number} must be an object with "role" and "content", not {found}; mend it')
    role = message["role"]
    if role not in ROLES:
        shown = excerpt(role) if isinstance(role, str) else kind_of(role)
        fail(path, line, f"message {number} has the role {shown}; use {', '.join(ROLES)}")
    return Turn(role, checked_text(path, line, f"the content of message {number}", message["content"]))


def _checked(path: str | Path, line: int, turns: list[Turn], labelled: bool) -> tuple[Turn, ...]:
    if any(turn.role == "system" for turn in turns[1:]):
        fail(path, line, "a system message after the first; put it at the beginning")
    if not labelled and turns[-1].role == "assistant":
        turns = turns[:-1]
    last = "assistant" if labelled else "user"
    if not turns or turns[-1].role != last or not any(turn.role == "user" for turn in turns):
        need = "a user's message and, last, the assistant's answer" if labelled else "a user's message at the end"
        fail(path, line, f"the conversation needs {need}; complete it or remove the line")
    return tuple(turns)
