"""`python -m launch status`: what it says of runs of Slurm's and of this machine's, from queues and from folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, status
from launch.status import status_of
from pretrain.config.load import dump_config, load_config
from tests.distributed import REPOSITORY
from tests.launch.jobs import Slurm, launched

CONFIG = REPOSITORY / "configs" / "gpt" / "demo.yaml"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def run(tmp_path: Path, slurm: Slurm) -> Path:
    """A folder as a run of 40 logged steps has it, the last line half written."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000030").mkdir(parents=True)
    (folder / "checkpoints" / ".step-00000040.partial").mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(CONFIG, ["schedule.total=500 steps"])))
    lines: list[dict[str, Any]] = [{"step": 40, "loss": 2.5, "tokens_per_second": 6100.4}]
    lines = [{"step": step, "loss": 3.0} for step in range(1, 40)] + [{"step": 40, "validation_loss": 2.75}, *lines]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 41, "lo')
    return folder


def begin(run: Path, job: str = "12", **more: Any) -> None:
    attempts.note(run, "begin", submission="s", job=job, attempt=1, step=0, nodes="n[1-2]", **more)


def end(run: Path, why: str, code: int, follows: str = "none") -> None:
    attempts.note(run, "end", submission="s", job="12", attempt=1, step=30, new=30, code=code, why=why, next=follows)


def test_a_running_job_is_told_with_its_progress(slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts.note(run, "submitted", submission="s", jobs=["12"])
    begin(run)
    (slurm.folder / "queue").write_text("12|12|RUNNING|None|n[1-2]\n13|13|RUNNING|None|n3\n")
    found = status_of(run)
    assert (found["state"], found["reason"], found["job"]) == ("running", "n[1-2]", "12")
    assert (found["step"], found["total_steps"], found["loss"], found["validation_loss"]) == (40, 500, 2.5, 2.75)
    assert (found["per_second"], found["unit"], found["checkpoint"]["step"]) == (6100.4, "tokens", 30)
    assert launched("status", run) == 0
    out = capsys.readouterr().out
    assert f"{run}: running (job 12), n[1-2]" in out
    assert "step 40 of 500, loss 2.5000, validation loss 2.7500, 6,100 tokens/s" in out
    assert "last checkpoint: step 30, 0:00:0" in out and f"tail -F {run}/logs/slurm-12.out" in out
    assert f"python -m pretrain tensorboard {run}" in out


def test_a_waiting_job_is_told_with_what_it_waits_for(slurm: Slurm, run: Path) -> None:
    attempts.note(run, "submitted", submission="s", jobs=["12"])
    (slurm.folder / "queue").write_text("12|12|PENDING|Priority|\n")
    assert {**status_of(run)}["state"] == "pending" and status_of(run)["reason"] == "Priority"


def test_each_attempt_is_told_with_why_it_ended(slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts.note(run, "submitted", submission="s", jobs=["12"])
    begin(run)
    end(run, "time limit", 75, "requeue")
    begin(run)  # no end: its node died
    begin(run)
    end(run, "failed, as 9 attempts before", 137)
    assert launched("status", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed, as 9 attempts before"
    assert [one["why"] for one in found["attempts"]] == ["time limit", None, "failed, as 9 attempts before"]
    assert launched("status", run) == 0
    out = capsys.readouterr().out
    assert "attempt 1: job 12 on n[1-2]" in out and "time limit (exit code 75); then requeue" in out
    assert "attempt 2: job 12 on n[1-2]" in out and "no end was said" in out


def test_a_job_that_vanished_is_what_sacct_says_or_lost(slurm: Slurm, run: Path) -> None:
    attempts.note(run, "submitted", submission="s", jobs=["12"])
    begin(run)
    assert status_of(run)["state"] == "lost"
    (slurm.folder / "bin" / "sacct").write_text("#!/bin/bash\necho NODE_FAIL\n")
    assert status_of(run)["state"] == "node_fail"


def test_without_slurm_the_folder_is_enough(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(run)
    end(run, "finished", 0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert status_of(run)["state"] == "finished"


def test_a_run_of_this_machine_is_running_while_its_process_lives(run: Path) -> None:
    here = {"pid": os.getpid(), "born": attempts.born(os.getpid()), "nodes": platform.node()}
    attempts.note(run, "begin", job="local", step=0, **here)
    assert status_of(run)["state"] == "running"
    attempts.note(run, "begin", job="local", step=0, **{**here, "born": "1"})  # another process has that number now
    assert status_of(run)["state"] == "killed"
    attempts.note(run, "begin", job="local", step=0, **{**here, "nodes": "elsewhere"})
    assert status_of(run)["state"] == "unknown"


def test_an_attempt_on_this_machine_is_noted_with_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def wait() -> int:
        assert status_of(run)["state"] == "running"
        (run / "checkpoints" / "step-00000007").mkdir(parents=True)
        return 75

    assert attempts.recorded(run, wait) == 75
    [one] = status_of(run)["attempts"]
    assert (one["why"], one["code"], one["begin_step"], one["end_step"]) == ("asked to stop", 75, 0, 7)
    assert attempts.why(137) == "killed by signal 9" and attempts.why(4) == "diverged"


def test_a_run_that_no_launcher_started_is_told_by_what_it_left(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    assert status_of(run)["state"] == "unknown"
    (run / "summary.json").write_text('{"reason": "early-stop"}')
    assert status_of(run)["state"] == "early-stop"
    (tmp_path / "empty").mkdir()
    assert status_of(tmp_path / "empty")["state"] == "not started"


def test_a_folder_of_seeds_stands_for_each(slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (2, 10):
        run = tmp_path / "seeds" / f"seed-{seed}"
        attempts.note(run, "submitted", submission="s", jobs=[f"12_{seed}"], logs=str(tmp_path / "seeds" / "logs"))
        begin(run, job=f"12_{seed}")
    (slurm.folder / "queue").write_text("12|12_10|RUNNING|None|n1\n")
    assert launched("status", tmp_path / "seeds", "--json") == 0
    two, ten = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (two["state"], ten["state"], ten["job"]) == ("lost", "running", "12_10")
    assert ten["tail"].endswith(f"{tmp_path}/seeds/logs/slurm-12_10.out")


def test_lines_of_nonsense_do_no_harm(slurm: Slurm, run: Path) -> None:
    path = attempts.path_of(run)
    path.parent.mkdir()
    path.write_text('{"event": "begin"\n[1]\n{"event": 3}\n\0\n')
    attempts.note(run, "submitted", submission="s", jobs=["12; touch hacked", 7, "--help"])
    assert status_of(run)["attempts"] == []
    assert launched("status", "no-such-folder") == 2


def test_of_long_metrics_the_end_alone_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TAIL", 1000)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(100)]
    (run / "metrics.jsonl").write_text("\n".join(['{"step": 500, "loss": 9.0}', *lines, ""]))
    (run / "metrics.jsonl").open("ab").write(b"{\xff")
    assert status_of(run)["step"] == 99


def test_the_names_in_its_commands_are_quoted(slurm: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / "$(touch hacked) 'x"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("here\n")
    command = status_of(folder)["tail"].replace("tail -F", "cat")
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True).stdout == b"here\n"
    assert not (tmp_path / "hacked").exists()
