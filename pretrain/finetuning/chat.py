"""A conversation as tokens: each message in its template, behind each answer a document's end.

What is asked up to an answer is one text and tokenized as one, the answer by itself: so a model is asked by the same tokens as
it was trained on, whatever the answer. A conversation that is too long loses its beginning; its last answer is cut only where
there is no room for it behind the template's own words.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pretrain.config.objective import TEXT, TemplateConfig
from pretrain.tasks.conversations import Turn
from pretrain.tokenization.base import Tokenizer

PROMPT_CUT = "a conversation longer than data.seq_length, its beginning cut"
RESPONSE_CUT = "an answer longer than data.seq_length, its end cut"


class Tokens(NamedTuple):
    """ids, and of each whether it is of an answer. `last`: where the last answer begins, or is to begin."""

    ids: list[int]
    answered: list[bool]
    last: int


class Chat:
    """How conversations are written for one model. length: tokens that it sees at most."""

    def __init__(self, template: TemplateConfig, tokenizer: Tokenizer, length: int) -> None:
        self.template, self.tokenizer, self.length = template, tokenizer, length
        self.opening = template.assistant.partition(TEXT)[0]

    def asked(self, prompt: str) -> str:
        """The text that asks for an answer to the prompt."""
        return self._written(Turn("user", prompt)) + self.opening

    def tokens(self, turns: Iterable[Turn]) -> Tokens:
        """Of a whole conversation. One that ends with a question is asked for its answer."""
        ids: list[int] = []
        answered: list[bool] = []
        text, last = "", 0
        for turn in turns:
            if turn.role != "assistant":
                text += self._written(turn)
                continue
            self._ask(ids, answered, text)
            text, last = "", len(ids)
            answer = [*self.tokenizer.encode(turn.text), self.tokenizer.eos]
            ids += answer
            answered += [True] * len(answer)
        if text:
            self._ask(ids, answered, text)
            last = len(ids)
        return Tokens(ids, answered, last)

    def fitted(self, tokens: Tokens) -> tuple[Tokens, list[str]]:
        """Of a conversation with its answer those of which all but the last fit the length; and what was cut, in words."""
        return self._cut(tokens, self.length + 1)

    def fitted_prompt(self, tokens: Tokens, room: int) -> tuple[Tokens, list[str]]:
        """Of a conversation that asks those that leave room for so many tokens of an answer, if that is half at most."""
        return self._cut(tokens, max(self.length - room, (self.length + 1) // 2))

    def _cut(self, tokens: Tokens, most: int) -> tuple[Tokens, list[str]]:
        over = len(tokens.ids) - most
        if over <= 0:
            return tokens, []
        opening = len(self.tokenizer.encode(self.opening))
        least = min(tokens.last, max(1, min(opening, most // 2)))  # that stay before the answer
        start = min(over, tokens.last - least)
        part = slice(start, start + most)
        told = [RESPONSE_CUT] * (over > start) + [PROMPT_CUT] * (start > 0)
        return Tokens(tokens.ids[part], tokens.answered[part], tokens.last - start), told

    def _ask(self, ids: list[int], answered: list[bool], text: str) -> None:
        found = self.tokenizer.encode(text + self.opening)
        if not ids and not found:
            found = [self.tokenizer.eos]  # an answer's first token needs one before it
        ids += found
        answered += [False] * len(found)

    def _written(self, turn: Turn) -> str:
        before, _, after = getattr(self.template, turn.role).partition(TEXT)
        return f"{before}{turn.text}{after}"
