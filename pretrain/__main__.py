"""The command line: `python -m pretrain COMMAND ...`, or `pretrain COMMAND ...`.

Commands import what they need when they run, so that --help and a mistake cost no second.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.commands import interchange, preparing, training, using
from pretrain.errors import Exit, UserError

OURS = ("kernels", "parallel", "launch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake prints one message and gives 2, Ctrl-C gives 130."""
    try:
        try:
            check_packages()
            args = parse(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that has left is no error; not when Python exits
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def check_packages() -> None:
    """Raises UserError if another package took the place of one of ours: PyPI has a `kernels`, ROS a `launch`."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found.parent.parent != home:
            raise UserError(
                f"the package {name!r} is {'missing' if found is None else f'another one, in {found.parent}'}; this "
                f"program's own is in {home}: uninstall the other, or run from a virtual environment of its own"
            )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; a mistake among them exits 2. Overrides may stand after the options too, where argparse
    leaves them, and options of another program where the command has them."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if hasattr(args, "of_lm_eval"):
        args.of_lm_eval, rest = rest, []
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Pre-train and use Transformer language models.",
        epilog="example: python -m pretrain train configs/gpt/demo.yaml optimizer.learning_rate=1e-3",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], words: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=words, description=words, epilog=f"example: python -m pretrain {example}"
        )
        command.set_defaults(run=run)
        return command

    for room in (preparing, training, using, interchange):
        room.add_commands(add)
    return top


if __name__ == "__main__":
    sys.exit(main())
