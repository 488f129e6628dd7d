"""How a room of commands adds its own to the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Protocol


class Add(Protocol):
    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], words: str, example: str
    ) -> argparse.ArgumentParser:
        """A command: what runs it, what it does in a sentence, and an example of its use without the program's name."""
