"""A prepared folder appears whole or not at all: killed, interrupted, started twice, in the way of something."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pretrain.data.folder import whole_folder
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from tests.distributed import run_python, start_python

CONTENTS = ("train", "report.json")


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three megabytes: some seconds of work, so that a signal always comes in its middle."""
    folder = tmp_path_factory.mktemp("large")
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in modules)
    for number in range(12):
        (folder / f"{number}.txt").write_bytes(b"# %d\n" % number + text[number << 17 :][: 1 << 18])
    return folder


def command(large: Path, model_file: Path, out: Path) -> list[str | Path]:
    options = ["--tokens-per-chunk", "16384", "--processes", "2", "--validation", "0", "--piece-bytes", "100000"]
    return ["pretrain", "prepare", large, "--out", out, "--tokenizer", model_file, *options]


@contextmanager
def preparing(large: Path, model_file: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`prepare` with two processes, in the middle of its work; killed at the end if it is still there."""
    with start_python(command(large, model_file, out)) as process:
        try:
            wait_for(in_the_middle(out), process)
            yield process
        finally:
            if not group_is_gone(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 90) -> None:
    """Look until it is so. A process that is waited for must be running all the while."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()


def in_the_middle(out: Path) -> Callable[[], bool]:
    """Pieces are being encoded, and one is done."""
    return lambda: any((out.parent / f".{out.name}.preparing").glob("work/encode/0*.json"))


def workers_on(out: Path) -> list[int]:
    """Processes that work on the folder's draft."""
    return [pid for pid, words in commands() if str(out.parent / f".{out.name}.preparing" / "work") in words]


def commands() -> Iterator[tuple[int, list[str]]]:
    """Every process, and its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_killed_in_the_middle_it_leaves_no_folder_and_the_next_start_goes_on(
    large: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    with preparing(large, model_file, out) as process:
        process.kill()
        process.communicate(timeout=90)  # its output ends when the tokenizing processes have ended too
        assert not out.exists()
        wait_for(lambda: not workers_on(out))  # the tokenizing processes end by themselves
    result = run_python(command(large, model_file, out))
    assert result.returncode == 0, result.stderr
    assert re.search(r"Going on with an unfinished work: [1-9]\d* of 12 pieces are done", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert Manifest.load(out / "train").documents == 12


def test_while_one_prepares_a_second_is_refused_and_ctrl_c_keeps_what_is_done(
    large: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "shards"
    with preparing(large, model_file, out) as process:
        os.killpg(process.pid, signal.SIGSTOP)
        second = run_python(["pretrain", "prepare", large, "--out", out, "--tokenizer", model_file])
        assert in_the_middle(out)()
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        errors = process.communicate(timeout=90)[1]
    assert second.returncode == 2
    assert second.stderr == f"error: Another process is preparing {out} right now.\n"
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in errors
    assert f"What is done is kept beside {out}: the same command goes on with it" in errors
    assert [path.name for path in out.parent.iterdir()] == [".shards.preparing"]
    assert not workers_on(out)


# -- the folder by itself --------------------------------------------------------------------------------------------


def test_it_appears_with_all_it_holds_when_the_work_is_done(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with whole_folder(out, CONTENTS, silent) as draft:
        (draft / "train").mkdir()
        (draft / "train" / "x").write_bytes(b"1")
        assert not out.exists()
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == ["train", "train/x"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_one_that_holds_something_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out, CONTENTS, silent) as draft:
        (draft / "report.json").write_bytes(b"1")
    for taken in (out, out / "report.json"):
        with (
            pytest.raises(UserError, match="exists and is not an empty folder: name another, or remove it first"),
            whole_folder(taken, CONTENTS, silent),
        ):
            raise AssertionError("entered")
    assert (out / "report.json").read_bytes() == b"1"


@pytest.mark.parametrize("error", [UserError("a mistake"), KeyboardInterrupt(), RuntimeError("a fault")])
def test_nothing_is_left_when_the_work_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), whole_folder(tmp_path / "out", CONTENTS, silent) as draft:
        (draft / "train").mkdir()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_second_one_is_refused_at_every_moment_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the very end: a second start that took the draft for a leftover would remove finished work."""
    out = tmp_path / "out"

    def second() -> None:
        words = "Another process is preparing|exists and is not an empty folder"
        with pytest.raises(UserError, match=words), whole_folder(out, CONTENTS, silent):
            raise AssertionError("entered")

    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (second(), rename(*names)))
    monkeypatch.setattr(os, "fsync", lambda handle: second())
    with whole_folder(out, CONTENTS, silent) as draft:
        (draft / "train").mkdir()
        second()
    assert [path.name for path in out.iterdir()] == ["train"]


def test_a_leftover_is_removed_and_said_but_a_strangers_folder_is_not(tmp_path: Path) -> None:
    draft = tmp_path / ".out.preparing"
    (draft / "train").mkdir(parents=True)
    said: list[str] = []
    with whole_folder(tmp_path / "out", CONTENTS, said.append):
        pass
    assert len(said) == 1 and "was interrupted; its leftover is removed" in said[0]
    stranger = tmp_path / ".other.preparing"
    (stranger / "thesis").mkdir(parents=True)
    (tmp_path / ".link.preparing").symlink_to(stranger)
    for name in ("other", "link"):
        with (
            pytest.raises(UserError, match=rf"\.{name}\.preparing is in the way and not a leftover of this program"),
            whole_folder(tmp_path / name, CONTENTS, said.append),
        ):
            raise AssertionError("entered")
    assert (stranger / "thesis").is_dir() and len(said) == 1


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"The disk that holds .*out is full: nothing was written"),
        whole_folder(tmp_path / "out", CONTENTS, silent) as draft,
    ):
        (draft / "train").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "n" * 300])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(UserError, match=f"{name} cannot be written: "),
        whole_folder(tmp_path / name, CONTENTS, silent),
    ):
        raise AssertionError("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
