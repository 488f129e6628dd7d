"""`python -m launch local`: what it checks, starts, passes on and tells. The ranks are small scripts where their
supervision is tested, and the program itself once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import run_python, start_python

# Runs `Ranks` on a script of the test's, in a process of its own that can be signalled and killed.
SUPERVISE = """
import sys
from pathlib import Path
from launch import local, ranks
ranks.GRACE_SECONDS = 1.0
environments = local.environments_of(int(sys.argv[1]))
sys.exit(ranks.Ranks([sys.executable, "rank.py"], environments, Path("logs")).wait())
"""

WAITS = """
import os, signal, sys, time
rank = os.environ["RANK"]
def save(number, frame):
    open(f"saved-{rank}", "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
open(f"pid-{rank}", "w").write(str(os.getpid()))
os.rename(f"pid-{rank}", f"up-{rank}")
"""


CONFIG = "configs/gpt/demo.yaml"


def tiny(folder: Path, shards: Path) -> list[str]:
    """What makes the demo's config a run of a second, in `folder`."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 64}
    return [
        *(f"model.{name}={value}" for name, value in shape.items()),
        *(f"data.{part}={shards / part}" for part in ("train", "validation")),
        *("data.seq_length=32", "batch.size=4", "batch.micro_size=2", "schedule.warmup=1 steps"),
        *("precision.compute=fp32", "precision.compile=never", "monitor.log_every=1 steps"),
        *("monitor.sample_every=null", "monitor.tensorboard=false", "monitor.validation_samples=4"),
        f"run.dir={folder / 'run'}",
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "supervise.py").write_text(SUPERVISE)
    return tmp_path


def supervise(folder: Path, script: str, processes: int) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(script)
    return start_python(["supervise", str(processes)], cwd=folder, env={"OMP_NUM_THREADS": None})


def wait_for_ranks(folder: Path, processes: int) -> list[int]:
    """The process ids of the ranks, once all are up."""
    deadline = time.monotonic() + 30
    while len(found := sorted(folder.glob("up-*"))) < processes:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [int(path.read_text()) for path in found]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in (Path("/proc") / str(pid) / "status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.02)


# -- the ranks -------------------------------------------------------------------------------------------------------


def test_each_rank_has_its_place_and_a_share_of_the_cores(folder: Path) -> None:
    script = "import json, os; json.dump(dict(os.environ), open('env-' + os.environ['RANK'], 'w'))"
    with supervise(folder, script, 3) as launcher:
        assert launcher.wait(30) == 0
    places = [json.loads((folder / f"env-{rank}").read_text()) for rank in range(3)]
    assert [(place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) for place in places] == [
        (str(rank), str(rank), "3") for rank in range(3)
    ]
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
    assert {place["OMP_NUM_THREADS"] for place in places} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


def test_rank_0_writes_here_and_the_others_to_logs(folder: Path) -> None:
    with supervise(folder, "import os; print('I am rank', os.environ['RANK'])", 2) as launcher:
        out, _ = launcher.communicate(timeout=30)
    assert out == "I am rank 0\n"
    assert (folder / "logs" / "rank-1.log").read_text() == "I am rank 1\n"


def test_failed_rank_is_told_with_its_last_words_and_the_others_end(folder: Path) -> None:
    script = WAITS + "print('what', rank, 'saw')\nif rank == '2': sys.exit(7)\ntime.sleep(60)\n"
    started = time.monotonic()
    with supervise(folder, script, 3) as launcher:
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 7
    assert time.monotonic() - started < 15
    assert "rank 2 ended with exit code 7; the ranks that waited for it are ended: 0, 1" in err
    assert "what 2 saw" in err and "what 1 saw" not in err
    wait_until_gone([int(path.read_text()) for path in folder.glob("up-*")])


def test_killed_rank_is_told_though_another_loses_its_peer(folder: Path) -> None:
    script = WAITS + "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(1)\n"
    with supervise(folder, script, 2) as launcher:
        _, err = launcher.communicate(timeout=30)
    # Rank 0 may be seen first: what is told then is the truth as well.
    assert (launcher.returncode, "rank 1 was killed by SIGKILL" in err) in ((137, True), (1, False))


def test_ranks_that_all_end_alike_are_told_by_rank_0_alone(folder: Path) -> None:
    script = "import sys; print('error: no such shards', file=sys.stderr); sys.exit(2)"
    with supervise(folder, script, 3) as launcher:
        _, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, err) == (2, "error: no such shards\n")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=lambda x: str(x)
)
def test_a_wish_to_stop_reaches_every_rank_once(folder: Path, number: int, code: int) -> None:
    with supervise(folder, WAITS + "time.sleep(60)", 3) as launcher:
        wait_for_ranks(folder, 3)
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert sorted(path.name for path in folder.glob("saved-*")) == ["saved-0", "saved-1", "saved-2"]
    assert "asked all ranks to save and end" in err and "exit code" not in err


def test_another_sigterm_leaves_them_the_time_to_save(folder: Path) -> None:
    script = WAITS.replace(
        '    open(f"saved', '    open(f"heard-{rank}", "w").close()\n    time.sleep(1)\n    open(f"saved'
    )
    with supervise(folder, script + "time.sleep(60)", 2) as launcher:
        wait_for_ranks(folder, 2)
        launcher.send_signal(signal.SIGTERM)
        while len(list(folder.glob("heard-*"))) < 2:
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 143 and "killed" not in err
    assert len(list(folder.glob("saved-*"))) == 2


def test_a_second_ctrl_c_kills_ranks_that_do_not_end(folder: Path) -> None:
    script = WAITS + "signal.signal(signal.SIGINT, lambda *_: open('heard', 'w').close())\n"
    script += "os.rename(f'up-{rank}', f'up-{rank}-deaf')\nwhile True: time.sleep(1)"
    with supervise(folder, script, 1) as launcher:
        while not (folder / "up-0-deaf").exists():
            time.sleep(0.02)
        pids = wait_for_ranks(folder, 1)
        launcher.send_signal(signal.SIGINT)
        while not (folder / "heard").exists():
            time.sleep(0.02)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    wait_until_gone(pids)


def test_no_rank_outlives_a_killed_launcher(folder: Path) -> None:
    with supervise(folder, WAITS + "time.sleep(60)", 3) as launcher:
        pids = wait_for_ranks(folder, 3)
        launcher.kill()
        wait_until_gone(pids)


# -- the command -----------------------------------------------------------------------------------------------------


def test_dry_run_shows_the_commands_and_starts_nothing(tmp_path: Path) -> None:
    overrides = tiny(tmp_path, tmp_path / "no-shards")
    options = ["--processes", "4", "--dry-run", "--profile", "5"]
    result = run_python(["launch", "local", CONFIG, *overrides, "parallel.tensor=2", *options, "parallel.pipeline=2"])
    assert result.returncode == 0, result.stderr
    assert "4 processes, tp2 x pp2, zero 1; nothing was started" in result.stdout
    words = [sys.executable, "-m", "pretrain", "train", CONFIG, *overrides, "parallel.tensor=2", "parallel.pipeline=2"]
    train = shlex.join([*words, "--profile=5"])
    assert [line.split(" ", 1)[0] for line in result.stdout.splitlines() if line.endswith(train)] == [
        f"RANK={rank}" for rank in range(4)
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0"], ["--processes: at least 1"]),
        (["--processes", "x"], ["invalid int value"]),
        ([], ["--processes"]),
        (["--processes", "2", "fast"], ["'fast'"]),
        (["--processes", "2", "--speed=2"], ["'--speed=2'"]),
        (["--processes", "2", "model.hiden_size=64"], ["model.hiden_size", "model.hidden_size"]),
        (
            ["--processes", "4", "parallel.tensor=3"],
            ["parallel.tensor: 3 does not divide", "parallel: tensor x context"],
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    overrides = tiny(tmp_path, tmp_path / "no-shards")
    result = run_python(["launch", "local", CONFIG, *overrides, *arguments])
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_folder_that_is_no_runs_is_left_as_it_is(tmp_path: Path) -> None:
    overrides = tiny(tmp_path, tmp_path / "no-shards")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    result = run_python(["launch", "local", CONFIG, *overrides, "--processes", "2"])
    assert result.returncode == 2 and "is no run's folder" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_missing_shards_are_told_once(tmp_path: Path) -> None:
    overrides = tiny(tmp_path, tmp_path / "no-shards")
    result = run_python(["launch", "local", CONFIG, *overrides, "--processes", "2", "parallel.tensor=2"])
    assert result.returncode == 2
    assert result.stderr.count("no-shards") == 1 and "Traceback" not in result.stderr


def test_two_processes_train_and_go_on_from_the_runs_folder(tmp_path: Path, tiny_data: Path) -> None:
    overrides = tiny(tmp_path, tiny_data)
    short = ["--processes", "2", "parallel.tensor=2"]
    first = run_python(["launch", "local", CONFIG, *overrides, *short, "schedule.total=3 steps"], timeout=60)
    assert first.returncode == 0, first.stderr
    second = run_python(["launch", "local", tmp_path / "run", "--processes", "2", "schedule.total=4 steps"], timeout=60)
    assert second.returncode == 0, second.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
