"""The commands that make runs: train, preflight, verify, sweep. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os

from pretrain.commands.adding import Add
from pretrain.config.profile import add_profile_option, check_profiled
from pretrain.errors import UserError


def _train(args: argparse.Namespace) -> int:
    from pretrain.config.load import help_config

    if args.help_config:
        print(help_config(), end="")
        return 0
    if args.config is None:
        raise UserError(
            "name a config file or a run's folder, for example: python -m pretrain train configs/gpt/demo.yaml"
        )
    from parallel.layout import rank_and_world
    from pretrain.data.sources import Sources
    from pretrain.runs import open_config

    config = open_config(args.config, args.overrides, rank_and_world()[1])
    sources = Sources.open(config)
    if args.profile is not None or config.monitor.profile_steps is not None:
        from pretrain.schedule import Plan

        total = Plan(config, sources.train.samples_per_epoch).total_steps
        check_profiled(args.profile, config.monitor.profile_steps, total)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes when it starts and stops
    from pretrain import session

    return session.main(config, sources, args.profile)


def _preflight(args: argparse.Namespace) -> int:
    from pretrain import preflight

    return preflight.main(args)


def _verify(args: argparse.Namespace) -> int:
    from pretrain import verify

    return verify.main(args)


def _sweep(args: argparse.Namespace) -> int:
    from pretrain import sweep

    return sweep.main(args)


# -- options ---------------------------------------------------------------------------------------------------------


def add_commands(add: Add) -> None:
    train = add("train", _train, "Train, or go on training.", "train configs/gpt/demo.yaml run.seed=2")
    train.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, or a run's folder to go on with")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file")
    train.add_argument(
        "--help-config", action="store_true", help="print every field with its default and meaning, as YAML"
    )
    add_profile_option(train)
    _preflight_options(
        add(
            "preflight", _preflight, "Check that the hosts are fit for a run.", "preflight configs/gpt/demo.yaml --json"
        )
    )
    verify = add(
        "verify",
        _verify,
        "Show that layouts train the same.",
        'verify configs/gpt/demo.yaml --layouts "tp=2" "pp=2,zero=1"',
    )
    verify.add_argument("config", metavar="CONFIG", help="a YAML file")
    verify.add_argument("overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file")
    verify.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="LAYOUT",
        help='such as "tp=2,sp,pp=2,zero=1,micro=2,recompute=full"',
    )
    verify.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps of each (default: 20)")
    verify.add_argument("--tiny", action="store_true", help="the same options at small sizes")
    verify.add_argument("--json", metavar="FILE", help="write the numbers here too")
    verify.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds a run may be silent (default: 600)"
    )
    _sweep_options(add)


def _preflight_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a run's folder")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file")
    command.add_argument("--json", action="store_true", help="one line of JSON in place of text")
    command.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="S",
        help="seconds to wait for ranks that do not come (default: 60)",
    )
    command.add_argument(
        "--floor",
        type=float,
        default=1,
        metavar="MB/S",
        help="that an all-reduce of each group must reach, unless parallel.bandwidth_floor says so (default: 1)",
    )


def _sweep_options(add: Add) -> None:
    sweep = add(
        "sweep",
        _sweep,
        "Many runs of one config: seeds, or a search over its fields.",
        "sweep configs/finetune/classification.yaml --out sweeps/reviews --seeds-weights 5 --seeds-order 5 --keep 8 --at 0.3",
    )
    sweep.add_argument("config", metavar="CONFIG", help="a YAML file")
    sweep.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file, in all"
    )
    sweep.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of a sweep that was stopped")
    sweep.add_argument(
        "--seeds-weights", type=int, default=1, metavar="N", help="seeds of the initial weights (default: 1)"
    )
    sweep.add_argument("--seeds-order", type=int, default=1, metavar="N", help="seeds of the data's order (default: 1)")
    sweep.add_argument(
        "--first-seed", type=int, default=1, metavar="N", help="the first of either, and of draws (default: 1)"
    )
    sweep.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="PATH=VALUES",
        help="a,b,c; or low..high, low..high:log with --trials",
    )
    sweep.add_argument(
        "--trials", type=int, metavar="N", help="draw so many of the search's values instead of all combinations"
    )
    sweep.add_argument("--keep", type=int, metavar="P", help="trials that go on after --at")
    sweep.add_argument(
        "--at", type=float, default=0.3, metavar="F", help="with --keep: share of the schedule (default: 0.3)"
    )
    sweep.add_argument(
        "--plan", action="store_true", help="train nothing: `python -m launch slurm DIR` makes jobs of the trials"
    )
    sweep.add_argument(
        "--halving", action="store_true", help="successive halving: a third goes on at each third of the way"
    )
