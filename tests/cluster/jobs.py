"""Jobs of `python -m launch slurm` on the tests' Slurm, and the local run whose numbers they must have."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import attempts
from tests.cluster.slurm import Cluster
from tests.distributed import REPOSITORY
from tests.pretrain import running
from tests.training import write_config

# A constant rate: the first steps of a run are the same however long it is.
TRAINING = (
    *("model.num_layers=2", "batch.micro_size=2", "schedule.kind=constant", "schedule.warmup=2 steps"),
    *("parallel.zero=1", "parallel.timeout=30", "checkpoint.every=5 steps"),
)
NODE = ("--env", "GLOO_SOCKET_IFNAME=lo")  # the nodes are one machine


def logged(run: Path) -> dict[int, tuple[Any, ...]]:
    """The numbers of each step, which nothing but the clock may change."""
    lines = [line for line in running.numbers_of(run) if "loss" in line]
    return {line["step"]: (line["loss"], line["grad_norm"], line["batch_hash"]) for line in lines}


class Reference:
    """The same training on two processes of this machine, without Slurm; it grows as far as it is asked for."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.run, self.source, self.known = folder / "run", write_config(folder, shards), 0

    def __call__(self, steps: int) -> dict[int, tuple[Any, ...]]:
        if steps > self.known:
            total = f"schedule.total={steps} steps"
            source = (self.run,) if self.known else (self.source, *TRAINING)
            ran = running.command("train", *source, total, world=2, timeout=180)
            assert ran.code == 0, ran.told
            self.known = steps
        found = logged(self.run)
        return {step: found[step] for step in range(1, steps + 1)}


class Submitted:
    """A job of the command under test, submitted from `work`."""

    def __init__(
        self,
        slurm: Cluster,
        folder: Path,
        shards: Path,
        *words: str,
        steps: int = 1_000_000,
        work: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.slurm, self.run = slurm, folder / "run"
        folder.mkdir(exist_ok=True)
        config = write_config(folder, shards)
        options = ["--nodes", "2", *NODE, *TRAINING, f"schedule.total={steps} steps", *words]
        ran = slurm.run([sys.executable, "-m", "launch", "slurm", config, *options], work, environment)
        assert ran.returncode == 0, ran.stderr
        self.folder = folder
        self.job = ran.stdout.split()[1].rstrip(":,")

    @property
    def log(self) -> str:
        return (self.run / "logs" / f"slurm-{self.job}.out").read_text(errors="replace")

    def step(self) -> int:
        """The last that was logged."""
        try:
            text = (self.run / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return 0
        steps = [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]
        return steps[-1] if steps else 0

    def wait_for(self, true: Callable[[], object], what: str, seconds: float = 240) -> None:
        try:
            self.slurm.wait_for(true, what, seconds)
        except AssertionError as error:
            error.add_note(self.log)
            raise

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step() >= step, f"step {step}")

    def stop(self) -> None:
        """As a person asks it to."""
        (self.run / "stop").touch()
        self.wait(state="FAILED")  # to Slurm, whatever the exit code is
        assert self.ends()[-1] == ("asked to stop", "none"), self.log

    def wait_for_end(self, attempt: int) -> None:
        self.wait_for(lambda: len(self.ends()) >= attempt, f"end of attempt {attempt}")

    def wait(self, state: str = "COMPLETED") -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_for(lambda: self.slurm.state(self.job) in over, f"end of job {self.job}")
        assert self.slurm.state(self.job) == state, self.log

    def ends(self) -> list[tuple[str, str]]:
        """Why each attempt ended, and what follows."""
        return [(line["why"], line["next"]) for line in attempts.read(self.run) if line["event"] == "end"]

    def status(self) -> Any:
        ran = self.slurm.run([sys.executable, "-m", "launch", "status", self.run, "--json"])
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)
