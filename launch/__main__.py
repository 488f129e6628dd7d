"""Start runs: `python -m launch local CONFIG --processes N`. Never imports torch: the ranks it starts do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pretrain.config.profile import add_profile_option
from pretrain.errors import UserError

EXAMPLE = "python -m launch local configs/gpt/demo.yaml --processes 4 parallel.tensor=2 parallel.pipeline=2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake prints one message and gives 2."""
    args = parse(argv)
    from launch.local import run

    try:
        return run(args.config, args.overrides, args.processes, args.dry_run, args.profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; a mistake among them exits 2. argparse cannot take overrides both before and after the
    options, so they are what it leaves."""
    top, local = _parsers()
    args, rest = top.parse_known_args(argv)
    args.overrides = rest
    for word in rest:
        if word.startswith("-") or "=" not in word:
            local.error(f"{word!r} is no option and no section.key=value")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole parser, and that of `local`."""
    top = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start training runs on several processes.",
        epilog="example: python -m launch local configs/gpt/demo.yaml --processes 4 parallel.tensor=2",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    local = commands.add_parser(
        "local",
        help="processes on this machine",
        description="Train on processes of this machine. Rank 0 writes here, the others to RUN/logs/rank-N.log. "
        "Ctrl-C saves and ends; the same command goes on.",
        usage="python -m launch local CONFIG --processes N [--dry-run] [--profile [N]] [section.key=value ...]",
        epilog=f"example: {EXAMPLE}",
    )
    local.add_argument("config", metavar="CONFIG", help="a YAML file, or a run's folder to go on with")
    local.add_argument("--processes", type=int, required=True, metavar="N", help="how many: tensor x pipeline x data")
    local.add_argument("--dry-run", action="store_true", help="check everything, show the commands, start nothing")
    add_profile_option(local)
    return top, local


if __name__ == "__main__":
    sys.exit(main())
