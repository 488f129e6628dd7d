"""The same folder, byte for byte, however the work is shared out, and whatever is killed, stopped or taken away meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.folder import PLAN
from pretrain.data import prepare as module
from pretrain.data.folder import lasting_folder
from pretrain.data.prepare import do_task, merge_only, plan_only, prepare
from pretrain.data.preparing import merge
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from tests.distributed import REPOSITORY, run_python, start_python
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts
from tests.pretrain.data.test_folder import wait_for, workers_on

PIECES = 26
OPTIONS = {
    "validation": 0.2,
    "tokens_per_chunk": 1024,
    "chunks_per_shard": 7,
    "piece_bytes": 10_000,
    "split": "blank-line",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of JSON and paragraphs in files that are cut, and small files: 26 pieces."""
    folder = tmp_path_factory.mktemp("texts")
    modules = stdlib_texts(30, 2_000, 9_000)
    lines = [line for text in modules for line in text.split("\n\n")]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines[:400], "", "\u2581"]))
    (folder / "b.txt").write_text("\n\n".join(lines[400:900]))
    for number, text in enumerate(modules[:9]):
        (folder / f"c{number}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def options(model_file: Path) -> Options:
    return Options(tokenizer=model_file, **OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(texts: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    quietly([texts], out, tokenizer=model_file, **OPTIONS)
    found = hashes(out)
    assert len([name for name in found if name.endswith(".tar")]) >= 6
    return found


def silent(_: str) -> None:
    pass


def draft_of(out: Path) -> Path:
    return out.parent / f".{out.name}.preparing"


# -- who does it changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_change_nothing(
    texts: Path,
    options: Options,
    expected: dict[str, str],
    tmp_path: Path,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Started where a file is called as a library: it is text, which no process imports."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("numpy.py").write_text("raise SystemExit('imported')\n")
    prepare([texts], tmp_path / "out", options, processes=processes, say=silent)
    assert hashes(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_size_of_pieces_changes_nothing_of_concatenated_text(
    texts: Path, model_file: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    for size in (3_000, 10_000_000):
        quietly([texts], tmp_path / str(size), tokenizer=model_file, **{**OPTIONS, "piece_bytes": size})
        assert hashes(tmp_path / str(size)) == expected


def test_a_trained_tokenizer_is_the_same_from_any_pieces_and_bounds(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sample smaller than the text: drawn at once, from pieces, and in several attempts as the bound is raised."""
    training = {"vocab_size": 420, "max_train_bytes": 20_000, **OPTIONS}
    found = []
    for size, margin in ((10_000_000, 4), (5_000, 4), (5_000, 0.3)):
        monkeypatch.setattr(module.sampling, "MARGIN", margin)
        quietly([texts], tmp_path / f"{size}-{margin}", **{**training, "piece_bytes": size})
        found.append(hashes(tmp_path / f"{size}-{margin}"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("tasks", [1, 3, 7])
def test_tasks_change_nothing_in_any_order_and_twice(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path, tasks: int
) -> None:
    out = tmp_path / "out"
    assert plan_only([texts], out, options, processes=1, say=silent).pieces == PIECES
    order = list(range(tasks))
    random.Random(tasks).shuffle(order)
    for task in [*order, order[0]]:
        do_task(out, task, tasks, processes=1, say=silent)
    do_task(out, 0, 2, processes=1, say=silent)  # of another number of tasks
    merge_only(out, processes=1, say=silent)
    assert hashes(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tasks_at_once_share_a_plan_and_the_merge_waits_for_them(
    texts: Path, model_file: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Two tasks that both do all pieces, by the command line: each writes what the other writes."""
    out = tmp_path / "out"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "chunks_per_shard"]
    planned = run_python(["pretrain", "prepare", texts, "--out", out, "--tokenizer", model_file, "--plan", *words])
    assert planned.returncode == 0 and f"{PIECES} pieces of 11 files" in planned.stdout, planned.stderr
    early = run_python(["pretrain", "prepare", "--out", out, "--merge"])
    assert early.returncode == 2 and f"{PIECES} of {PIECES} pieces of {out} are not encoded yet" in early.stderr
    task = ["pretrain", "prepare", "--out", out, "--task", "0", "--tasks", "1", "--processes", "1"]
    with start_python(task) as one, start_python(task) as other:
        assert [process.communicate(timeout=60)[1] for process in (one, other)] == ["", ""]
        assert (one.returncode, other.returncode) == (0, 0)
    merged = run_python(["pretrain", "prepare", "--out", out, "--merge", "--processes", "1"])
    assert merged.returncode == 0 and "validation" in merged.stdout, merged.stderr
    tokens = {name: digest for name, digest in hashes(out).items() if name.endswith(".model") or name == "report.json"}
    assert tokens == {name: expected[name] for name in tokens}


def test_options_without_effect_and_parts_out_of_order_are_refused(texts: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--task", "0"], "--task I and --tasks N belong together"),
        (["--task", "3", "--tasks", "3"], "--task is a number from 0 to below --tasks, not 3 of 3"),
        (["--task", "0", "--tasks", "2"], "There is no plan for out: make it with"),
        (["--merge"], "There is no plan for out: make it with"),
        (["--merge", "--plan"], "--plan and --merge are different parts"),
        (["--merge", "--seed", "3", "--split", "file"], "--split, --seed: belong to --plan"),
        ([str(texts), "--merge"], "the texts: belong to --plan"),
        ([str(texts), "--timeout", "0"], "--timeout is a time in seconds, not 0"),
    ):
        result = run_python(["pretrain", "prepare", *words, "--out", "out"], cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "") and message in result.stderr.replace(f"{tmp_path}/", "")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_of_a_file_is_removed_at_the_next_start(
    texts: Path, options: Options, tmp_path: Path
) -> None:
    encode = draft_of(tmp_path / "out") / "work" / "encode"
    plan_only([texts], tmp_path / "out", options, processes=1, say=silent)
    do_task(tmp_path / "out", 0, PIECES, processes=1, say=silent)
    (encode / ".000001.train.host-7-a1b2c3").write_bytes(b"part")
    plan_only([texts], tmp_path / "out", options, processes=1, say=silent)
    assert sorted(path.name for path in encode.iterdir()) == [
        f"000000.{end}" for end in ("json", "train", "validation")
    ]


def test_interrupted_before_there_is_a_plan_it_leaves_nothing(
    texts: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.plan, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "out", options, processes=1, say=silent)
    assert list(tmp_path.iterdir()) == []


# -- killed, and started again -----------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_goes_on_and_does_nothing_twice(
    texts: Path, model_file: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Five kills at random moments; what a killed one had finished keeps its time of writing."""
    out, seen = tmp_path / "out", dict[Path, int]()
    words = [texts, "--out", out, "--tokenizer", model_file, "--processes", "2"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "chunks_per_shard"]
    draw = random.Random(8)
    for _ in range(5):
        with start_python(["pretrain", "prepare", *words]) as process:
            wait_for_results(out, len(seen) + draw.randrange(1, 6), process)
            process.kill()
        wait_for(lambda: not workers_on(out))
        now = results(out)
        assert {path: now.get(path) for path in seen} == seen
        seen = now
    result = run_python(["pretrain", "prepare", *words])
    assert result.returncode == 0, result.stderr
    assert "Going on with an unfinished work" in result.stderr
    quietly([texts], tmp_path / "whole", tokenizer=model_file, **{**OPTIONS, "chunks_per_shard": 512})
    assert hashes(out) == hashes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def results(out: Path) -> dict[Path, int]:
    """Pieces and shards that are done, and when each was."""
    work, times = draft_of(out) / "work", dict[Path, int]()
    for stage in ("encode", "train", "validation"):
        for path in work.glob(f"{stage}/0*.json"):
            wrote = (
                draft_of(out) / stage / f"shard-{path.stem[1:]}.tar"
                if stage != "encode"
                else path.with_suffix(".train")
            )
            times |= {one: one.stat().st_mtime_ns for one in (path, wrote)}
    return times


def wait_for_results(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while len(results(out)) < count and process.poll() is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_merge_goes_on_where_it_was_killed(
    texts: Path, options: Options, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes in turn: every shard, manifest, the report, and between the last of all and the new name."""
    out, moments = tmp_path / "out", 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    monkeypatch.setattr("pretrain.data.preparing.work.write_shard_of", killing(merge.write_shard_of))
    monkeypatch.setattr(merge, "write_manifest", killing(merge.write_manifest))
    monkeypatch.setattr(module.stages, "remove", killing(module.stages.remove))
    monkeypatch.setattr(module, "publish", killing(module.publish))
    while not out.exists():
        countdown = 3  # two of them succeed, so that each start comes one further
        moments += 1
        try:
            prepare([texts], out, options, processes=1, say=silent)
        except KeyboardInterrupt:
            assert not out.exists()
    assert moments > 3 and hashes(out) == expected


def test_another_text_or_option_is_refused_until_restart(
    texts: Path, options: Options, tmp_path: Path, expected: dict[str, str]
) -> None:
    own = tmp_path / "texts"
    shutil.copytree(texts, own)
    plan_only([own], tmp_path / "out", options, processes=1, say=silent)
    do_task(tmp_path / "out", 0, 4, processes=1, say=silent)
    with pytest.raises(UserError, match="--seed was 0, and is 1"):
        prepare([own], tmp_path / "out", Options(**{**vars(options), "seed": 1}), processes=1, say=silent)
    (own / "c0.py").write_text("another text\n")
    with pytest.raises(UserError, match=r"c0\.py has changed since the work began"):
        prepare([own], tmp_path / "out", options, processes=1, say=silent)
    said: list[str] = []
    prepare([own], tmp_path / "out", options, processes=1, say=said.append, restart=True)
    assert not any("Going on" in line for line in said)
    quietly([own], tmp_path / "fresh", **vars(options))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_standard_input_that_is_given_again_goes_on_and_another_is_refused(
    texts: Path, model_file: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", (texts / "b.txt").read_bytes()
    words = ["-", "--out", out, "--tokenizer", model_file, "--piece-bytes=9000", "--split=blank-line", "--processes=1"]

    def run(data: bytes, *more: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "pretrain", "prepare", *map(str, words), *more]
        return subprocess.run(command, input=data, capture_output=True, cwd=REPOSITORY, timeout=60)

    assert run(text, "--plan").returncode == 0
    do_task(out, 0, 2, processes=1, say=silent)
    other = run(text + b"\n\nmore")
    assert other.returncode == 2 and b"standard input has changed since the work began" in other.stderr
    result = run(text)
    assert result.returncode == 0 and b"Going on with an unfinished work" in result.stderr, result.stderr
    own = tmp_path / "standard input"
    own.write_bytes(text)
    quietly([own], tmp_path / "file", tokenizer=model_file, split="blank-line")
    assert {**hashes(out), "report.json": ""} == {**hashes(tmp_path / "file"), "report.json": ""}


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
