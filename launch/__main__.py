"""Start runs: `python -m launch local CONFIG --processes N`. Never imports torch: the ranks it starts do.

Each command is a module that adds its parser and runs. They import what they need when they run, so that --help is there
at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launch import docker, local, node, slurm, status
from pretrain.errors import Exit, UserError

COMMANDS = (local, slurm, docker, node, status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake prints one message and gives 2."""
    args = parse(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; a mistake among them exits 2. The overrides are what argparse leaves."""
    args, rest = parser().parse_known_args(argv)
    for word in rest:
        if not hasattr(args, "overrides"):
            args.error(f"{word!r} is no option")
        if word.startswith("-") or "=" not in word:
            args.error(f"{word!r} is no option and no section.key=value")
    if rest:
        args.overrides = rest
    return args


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start training runs on several processes.",
        epilog=f"example: {local.EXAMPLE}",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = module.add_parser(commands)
        command.set_defaults(run=module.run, error=command.error)
    return top


if __name__ == "__main__":
    sys.exit(main())
