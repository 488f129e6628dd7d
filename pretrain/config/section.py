"""What every section of the configuration shares: strict types, no unknown keys, one meaning a field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of the configuration. Numbers are no strings and booleans no numbers: YAML already tells them apart."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def meaning(default: Any, words: str, **limits: Any) -> Any:
    """A field with its default, its meaning in one line (with the unit), and its limits (ge, gt, le, lt)."""
    return Field(default, description=words, **limits)
