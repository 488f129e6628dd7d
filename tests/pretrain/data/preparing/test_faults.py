"""Processes that die or stop, and what is taken away meanwhile: one message, and what is done is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.folder import PLAN
from pretrain.data import prepare as module
from pretrain.data.folder import lasting_folder
from pretrain.data.prepare import do_task, merge_only, plan_only, prepare
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from tests.distributed import REPOSITORY, run_python, start_python
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts
from tests.pretrain.data.preparing.works import OPTIONS, draft_of, results, silent
from tests.pretrain.data.test_folder import workers_on

# -- processes that die or stop ----------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of Python's path in which `sitecustomize` lets a worker's piece number 3 wait while a file `wait` is there."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time, sys\n"
        "if 'pretrain.data.preparing.worker' in ' '.join(sys.orig_argv):\n"
        "    import pretrain.data.preparing.work as work\n"
        "    encode = work.encode_piece\n"
        "    def waiting(tools, number, beat):\n"
        f"        open('{folder}/began-%d-%d' % (number, os.getpid()), 'w').close()\n"
        f"        while number == 3 and os.path.exists('{folder}/wait'):\n"
        "            time.sleep(0.05)\n"
        "        return encode(tools, number, beat)\n"
        "    work.encode_piece = waiting\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
    (folder / "wait").touch()
    yield folder


def worker_at_three(slow: Path, known: set[int]) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in slow.glob("began-3-*"):
            if (pid := int(path.name.rpartition("-")[2])) not in known:
                return pid
        time.sleep(0.02)
    raise AssertionError("no process came to piece 3")


def command(texts: Path, model_file: Path, out: Path, *more: str) -> list[str | Path]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "chunks_per_shard"]
    return ["pretrain", "prepare", texts, "--out", out, "--tokenizer", model_file, "--processes", "2", *words, *more]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_replaced_and_nothing_is_lost(
    texts: Path, model_file: Path, slow: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    with start_python(command(texts, model_file, out, "--timeout", "3")) as process:
        os.kill(worker_at_three(slow, set()), number)
        (slow / "wait").unlink()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    why = "was killed by SIGKILL" if number == signal.SIGKILL else "gave no sign of life for 3 s and was killed"
    assert f"piece 3 ({texts}/a.jsonl, bytes " in errors and f"its process {why}; it is done again (2 of 3)" in errors
    quietly([texts], tmp_path / "whole", tokenizer=model_file, **{**OPTIONS, "chunks_per_shard": 512})
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not workers_on(out)


def test_a_piece_that_ends_three_processes_ends_the_work_by_name_and_keeps_the_rest(
    texts: Path, model_file: Path, slow: Path, tmp_path: Path
) -> None:
    out, known = tmp_path / "out", set[int]()
    with start_python(command(texts, model_file, out)) as process:
        for _ in range(3):
            known.add(pid := worker_at_three(slow, known))
            os.kill(pid, signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in errors
    assert f"piece 3 ({texts}/a.jsonl, bytes " in errors and "3 processes ended over it" in errors
    assert "the last was killed by SIGKILL" in errors and "use fewer --processes" in errors
    (slow / "wait").unlink()
    assert run_python(command(texts, model_file, out)).returncode == 0
    assert not workers_on(out)


def test_a_fault_of_the_program_is_told_with_its_place(texts: Path, options: Options, tmp_path: Path) -> None:
    plan_only([texts], tmp_path / "out", options, processes=1, say=silent)
    (draft_of(tmp_path / "out") / "work" / "tokenizer.json.sha256").write_text('{"file": "tokenizer.model"}')
    (draft_of(tmp_path / "out") / "work" / "pieces.jsonl").write_text("no JSON\n" * 99)
    with pytest.raises(RuntimeError, match=r"(?s)a process failed:\n.*JSONDecodeError"):
        prepare_all(tmp_path / "out")
    assert not workers_on(tmp_path / "out")


def prepare_all(out: Path) -> None:
    from pretrain.data.preparing.stages import Stages
    from pretrain.data.preparing.tools import Job, Tools

    work = Stages(Tools(draft_of(out) / "work"), 2, silent)
    try:
        work._pool.run([Job("encode", 0), Job("encode", 1)], str, lambda *_: None, lambda _: None)
    finally:
        work.close()


# -- what is taken away meanwhile --------------------------------------------------------------------------------------


def test_a_source_that_vanishes_in_the_middle_is_one_message_and_nothing_is_lost(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path
) -> None:
    own = tmp_path / "texts"
    shutil.copytree(texts, own)
    plan_only([own], tmp_path / "out", options, processes=1, say=silent)
    (own / "b.txt").rename(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt is gone since the work began\. Bring back"):
        do_task(tmp_path / "out", 0, 1, processes=2, say=silent)
    done = results(tmp_path / "out")
    assert done
    (tmp_path / "b.txt").rename(own / "b.txt")
    prepare([own], tmp_path / "out", options, processes=1, say=silent)
    found = {**hashes(tmp_path / "out"), "report.json": ""}
    assert found == {**expected, "report.json": ""}  # the report has the names of files


def test_a_full_disk_is_one_message_and_what_was_written_is_kept(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync, left = tmp_path / "out", os.fsync, 40

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"The disk that holds .*out is full: what was written before is kept") as error:
        prepare([texts], out, options, processes=1, say=silent)
    assert "the same command goes on. Free some space" in str(error.value)
    monkeypatch.setattr(os, "fsync", fsync)
    assert results(out) and not [path for path in draft_of(out).rglob(".*") if path.name != ".preparing"]
    said: list[str] = []
    prepare([texts], out, options, processes=1, say=said.append)
    assert hashes(out) == expected and "Going on with an unfinished work" in said[0]


def test_a_real_disk_that_is_full_in_several_processes(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path
) -> None:
    """A file system of 200 kB, where mounting is permitted; the texts' tokens need more. Then it grows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        return
    try:
        with pytest.raises(UserError, match=r"The disk that holds .*out is full: what was written before is kept"):
            prepare([texts], disk / "out", options, processes=2, say=silent)
        done = results(disk / "out")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        said: list[str] = []
        prepare([texts], disk / "out", options, processes=2, say=said.append)
        assert hashes(disk / "out") == expected
        assert done and "Going on with an unfinished work" in said[0]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_place_that_cannot_be_written_is_one_message(texts: Path, options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/out cannot be written: File exists"):
        prepare([texts], tmp_path / "file" / "out", options, processes=1, say=silent)


def test_a_merge_is_refused_while_a_task_is_at_work_and_a_task_while_a_merge_is(
    texts: Path, options: Options, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan_only([texts], out, options, processes=1, say=silent)
    for shared, second in ((True, merge_only), (False, lambda out, **rest: do_task(out, 0, 1, **rest))):
        with (
            lasting_folder(out, module.CONTENTS, PLAN, silent, new=False, shared=shared),
            pytest.raises(UserError, match=r"Another process is preparing .*out right now"),
        ):
            second(out, processes=1, say=silent)  # type: ignore[operator]


def test_strict_stops_at_the_first_and_without_it_the_work_goes_on(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path
) -> None:
    strict = Options(**{**vars(options), "strict": True})
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl:401: empty \(without --strict it would be skipped"):
            prepare([texts], tmp_path / "out", strict, processes=processes, say=silent)
    prepare([texts], tmp_path / "out", options, processes=1, say=silent)
    assert hashes(tmp_path / "out") == expected


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(texts: Path, model_file: Path, out: Path) -> int:
    """KiB that one process that does all of it had at most."""
    words = ["pretrain", "prepare", texts, "--out", out, "--tokenizer", model_file, "--validation=0", "--processes=1"]
    words += ["--piece-bytes=1000000"]
    program = "import sys; from pretrain.__main__ import main; main(sys.argv[1:]); "
    program += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, words[1:]), "--split=blank-line"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_memory_does_not_grow_with_the_text(tmp_path: Path, model_file: Path) -> None:
    """Four times the text in pieces of one size: within 5%."""
    text = "\n\n".join(stdlib_texts(60, 2_000, 12_000)).encode()
    found = []
    for megabytes in (2, 8):
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(b"\n\n".join([text] * (megabytes * 1_000_000 // len(text))))
        found.append(peak(path, model_file, tmp_path / f"out-{megabytes}"))
    assert found[1] < 1.05 * found[0], found
