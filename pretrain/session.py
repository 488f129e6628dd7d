"""One session of a run: the ranks meet and agree, and the run begins or goes on, until it ends or is asked to stop."""

from __future__ import annotations

import math
from pathlib import Path

from parallel.grid import stop_grid
from parallel.layout import Layout, rank_and_world
from pretrain import agreement, preflight
from pretrain.build import choose_precision, stage_layers
from pretrain.config.folder import STOP
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.errors import Exit
from pretrain.heartbeat import Heartbeat
from pretrain.interrupt import Interrupt
from pretrain.logs import RankLog
from pretrain.report import Facts, Reporter, Silent
from pretrain.sizes import parameters_of
from pretrain.train import Run, train
from pretrain.trainable import check_trainable

FEW_STEPS = 300  # of a task, below which small sets give unsteady scores (Mosbach et al. 2021; Zhang et al. 2021)


def main(config: Config, sources: Sources, profile: int | None = None) -> int:
    """`python -m pretrain train` from a checked config and its data. profile: steps to be measured. Returns the exit
    code."""
    rank, world = rank_and_world()
    layers = stage_layers(config, sources.sizes.vocab_size)
    check_trainable(config, sources.sizes, Layout.of(config.parallel, world), layers)
    with (
        RankLog(Path(config.run.dir), rank, world) as log,
        Heartbeat(rank, world, config.parallel.timeout) as heartbeat,
    ):
        return _main(config, sources, profile, heartbeat, log)


def _main(config: Config, sources: Sources, profile: int | None, heartbeat: Heartbeat, log: RankLog) -> int:
    rank, world = rank_and_world()
    layout = Layout.of(config.parallel, world)
    interrupt = Interrupt.watch(None if rank else Path(config.run.dir) / STOP)
    grid = preflight.join(layout, config.parallel.timeout)
    heartbeat.start()
    agreement.check(config, sources, grid, {"--profile": str(profile)})
    config = choose_precision(config, grid)
    unfit = preflight.check(config, sources, grid)
    log.start()
    run = Run(config, grid, sources, interrupt)
    run.heartbeat = heartbeat
    run.profile.first = profile
    reporter = _reporter(run, log)
    report = run.keeper.report_may_fail("the run's report")
    with report, reporter as run.reporter:
        run.resume()
        over = run.ending(stop=False)
        if not over:
            heartbeat.show(run.folder)
            for line in unfit:
                run.reporter.warn(line)
        reason = over or train(run)
        (run.reporter.over if over else run.reporter.end)(run.state, reason)
        if unmeasured := run.profile.close():
            run.reporter.warn(unmeasured)
    grid.wait()  # rank 0 still wrote: who sees a rank end with a code of its own ends the others
    interrupt.ignore()
    stop_grid()
    return exit_code(reason, run.share_reached)


def exit_code(reason: str, share_reached: bool) -> Exit:
    """The same on every rank, whichever was asked to stop: no launcher may take the run for finished."""
    if reason == "stopped" and not share_reached:
        return Exit.STOPPED
    return Exit.DIVERGED if reason == "diverged" else Exit.FINISHED


def _reporter(run: Run, log: RankLog) -> Silent:
    """Rank 0 tells, on the terminal and in its log."""
    if run.grid.rank:
        return Silent()
    reporter = Reporter(run.config, run.grid, facts_of(run))
    reporter.terminal.record = log.line
    return reporter


def facts_of(run: Run) -> Facts:
    """What its report begins with."""
    sources, built = run.sources, run.built
    parts = [part for part in (getattr(sources.train, "examples", None), sources.examples) if part is not None]
    return Facts(
        parameters=parameters_of(run.config, sources.sizes),
        frozen=sum(map(math.prod, run.frozen.values())),
        vocab_size=sources.vocabulary.size,
        plan=run.plan,
        compiled=built.compiled,
        kernels=built.kernels,
        passed_over=built.passed_over,
        start=run.start.told,
        findings=(
            *(f"{part.path}: {line}" for part in parts for line in part.findings.sentences()),
            *sources.train.findings,
            *_few(run),
        ),
    )


def _few(run: Run) -> list[str]:
    """A warning where so short a run of a task says little."""
    steps = run.plan.total_steps
    if run.sources.task is None or steps >= FEW_STEPS:
        return []
    return [
        f"warning: {steps:,} steps are few: below about {FEW_STEPS} a task's score depends much on the seed; train longer, "
        "or compare several seeds"
    ]
