"""All jobs of a stage, by this process or by several, and of a task of several its share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from pretrain.data.documents import Skipped
from pretrain.data.preparing.files import read_json
from pretrain.data.preparing.merge import LAYOUT
from pretrain.data.preparing.options import PARTS
from pretrain.data.preparing.pool import TIMEOUT, Pool
from pretrain.data.preparing.selecting import CLUSTERS
from pretrain.data.preparing.tools import ENCODE, SAMPLE, SIGN, Job, Tools
from pretrain.data.preparing.work import do
from pretrain.data.progress import Progress

VERBS = {SIGN: "Comparing", SAMPLE: "Reading", ENCODE: "Tokenizing", **dict.fromkeys(PARTS, "Writing shards")}


@dataclass
class Stages:
    """Does stages, with the same processes. share: (task, tasks) of one of several that each do a part of the pieces."""

    tools: Tools
    processes: int
    say: Callable[[str], None]
    timeout: float = TIMEOUT
    strict: bool = False
    share: tuple[int, int] = (0, 1)
    _pool: Pool = field(init=False)

    def __post_init__(self) -> None:
        self._pool = Pool(self.tools.work, self.processes, self.timeout, self.say)

    def run(self, stage: str) -> None:
        """Do what is not done of a stage."""
        (self.tools.work / stage).mkdir(exist_ok=True)
        jobs = self._jobs(stage)
        few = list(islice(jobs, 2))
        if not few:
            return
        with Progress(self._bytes(stage), self.say, VERBS[stage]) as progress:

            def beat(size: int, tokens: int) -> None:
                progress.add(tokens, size)

            if self.processes == 1 or len(few) == 1:  # without the half second that a process takes to start
                for job in chain(few, jobs):
                    do(self.tools, job, beat)
                    self._check(job)
            else:
                self._pool.run(chain(few, jobs), self._name, beat, self._check)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _jobs(self, stage: str) -> Iterator[Job]:
        return (job for job in self._all(stage) if not self.tools.is_done(job))

    def _all(self, stage: str) -> Iterable[Job]:
        if stage in PARTS:
            return (Job(stage, number) for number in range(read_json(self.tools.work / LAYOUT)[stage]["shards"]))
        task, tasks = self.share
        return (Job(stage, number) for number in range(task, self.tools.plan.pieces, tasks))

    def _bytes(self, stage: str) -> int | None:
        """That are to be done, where they can be told."""
        if stage in PARTS:
            return int(read_json(self.tools.work / LAYOUT)[stage]["tokens"]) * self.tools.dtype.itemsize
        plan, (task, tasks) = self.tools.plan, self.share
        pieces = [
            piece for piece in plan if piece.number % tasks == task and not self.tools.is_done(Job(stage, piece.number))
        ]
        sizes = [piece.bytes for piece in pieces]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _name(self, job: Job) -> str:
        if job.stage in PARTS:
            return f"{job.stage} shard {job.number}"
        return self.tools.plan.piece(job.number).name

    def _check(self, job: Job) -> None:
        """With --strict the first document that could not be read ends the work."""
        if self.strict and job.stage not in PARTS:
            found = self.tools.result(job)
            Skipped(strict=True).merge(found["skipped"], found["examples"])


def clear(tools: Tools) -> None:
    """Remove what writers that were killed left of their files. Only where no other writes."""
    for stage in VERBS:
        for path in (tools.work / stage).glob(".*"):
            path.unlink(missing_ok=True)


def remove(tools: Tools) -> None:
    """What the stages wrote, but not the plan: by it a start that comes now knows that all is done."""
    for stage in (*VERBS, CLUSTERS):
        shutil.rmtree(tools.work / stage, ignore_errors=True)
