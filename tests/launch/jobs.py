"""Batch scripts run by bash for the tests, where small scripts stand for Slurm's commands: what a job decides, without
Slurm. tests/cluster/test_slurm.py has it with the real one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.distributed import REPOSITORY

CONFIG = REPOSITORY / "configs" / "gpt" / "demo.yaml"
SIZE = ("--nodes", "2", "--time", "1:00:00")
LAYOUT = ("batch.micro_size=1",)
COMMANDS = {
    "srun": """printf '%s\\0' "$@" >"$FAKE/srun"
env -0 >"$FAKE/environment"
save() { mkdir -p "$RUN/checkpoints/step-$1"; }
source "$FAKE/step.sh"
""",
    "scontrol": """case "$1 $2" in
    "show hostnames") printf '%s\\n' n1 n2 ;;
    "show node") echo "NodeName=$3 CPUTot=2 NodeAddr=10.0.0.1 NodeHostName=$3" ;;
    "show job") echo "JobId=$4 JobState=$(cat "$FAKE/state") Reason=None" ;;
    requeue*) echo "$2" >>"$FAKE/requeued"; kill -9 $PPID ;;
esac
""",
    "sbatch": """printf '%s\\0' "$@" >>"$FAKE/sbatch"
echo >>"$FAKE/submitted"
echo "$((40 + $(wc -l <"$FAKE/submitted")))"
""",
    "squeue": 'cat "$FAKE/queue"\n',
    "sacct": "exit 1\n",
}


class Slurm:
    """A folder with the commands, first on PATH, and what they were given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        (folder / "bin").mkdir(parents=True)
        for name, text in COMMANDS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}")
            path.chmod(0o700)
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", self.path)
        monkeypatch.setenv("FAKE", str(folder))
        (folder / "state").write_text("RUNNING")
        (folder / "queue").touch()

    def words(self, name: str) -> list[str]:
        """What a command was last given (sbatch: all that it was ever given)."""
        return (self.folder / name).read_text().split("\0")[:-1]

    def environment(self) -> dict[str, str]:
        """That of the last srun."""
        pairs = (self.folder / "environment").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair)

    def attempt(self, run: Path, step: str, restart: int = 0, task: int | None = None) -> int:
        """Run the job's script as Slurm would, with bash lines as its step; the exit code, -9 where it was requeued."""
        (self.folder / "step.sh").write_text(step)
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "RUN": str(run)}
        variables |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        if task is not None:
            variables |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7", "RUN": f"{run}/seed-{task}"}
        result = subprocess.run(
            ["bash", run / "launch" / "job.sh"],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        self.told = result.stdout + result.stderr
        return result.returncode

    @property
    def requeued(self) -> int:
        path = self.folder / "requeued"
        return path.read_text().count("\n") if path.exists() else 0


def directives(script: str) -> dict[str, str]:
    """What stands in a script's #SBATCH lines, before its first command, as sbatch reads them."""
    found: dict[str, str] = {}
    for line in script.splitlines()[1:]:
        if line.strip() and not line.startswith("#"):
            return found
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH ").partition("=")
            found[name] = value
    return found


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Lines of attempts.jsonl of one kind."""
    lines = (json.loads(line) for line in (run / "launch" / "attempts.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def launched(*words: str | Path) -> int:
    """`python -m launch WORDS` in this process."""
    return main([str(word) for word in words])


def rendered(capsys: pytest.CaptureFixture[str], options: Sequence[str | Path]) -> str:
    """The script that --dry-run prints."""
    capsys.readouterr()
    assert launched("slurm", *options, "--dry-run") == 0
    return capsys.readouterr().out
