"""The same folder, byte for byte, however the work is shared out, and wherever it is killed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import prepare as module
from pretrain.data.prepare import do_task, merge_only, plan_only, prepare
from pretrain.data.preparing import merge
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from tests.distributed import REPOSITORY, run_python, start_python
from tests.pretrain.data.corpus import hashes, quietly
from tests.pretrain.data.preparing.works import OPTIONS, PIECES, draft_of, results, silent
from tests.pretrain.data.test_folder import wait_for, workers_on

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
