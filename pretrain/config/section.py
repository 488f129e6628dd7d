"""What every section of the configuration shares: strict types, no unknown keys, one meaning a field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parallel.layout import Problem


class Inconsistent(ValueError):
    """Fields that are right by themselves, but not together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{path}: {message}; {mend}" for path, message, mend in problems))
        self.problems = problems


class Section(BaseModel):
    """A frozen part of the configuration. Numbers are no strings and booleans no numbers: YAML already tells them apart."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Problem]:
        """All that is wrong between the fields; paths begin in this section."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(self.problems()):
            raise Inconsistent(found)
        return self


def meaning(default: Any, words: str, **limits: Any) -> Any:
    """A field with its default, its meaning in one line (with the unit), and its limits (ge, gt, le, lt)."""
    return Field(default, description=words, **limits)
