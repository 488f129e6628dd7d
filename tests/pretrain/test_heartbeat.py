"""A rank that hangs or fails ends the others in time, and they say who was first, where, and what they waited in."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import heartbeat, pulse
from pretrain.errors import UserError
from pretrain.heartbeat import Beat, Heartbeat, first_to_part
from tests.distributed import RankError, run_ranks
from tests.training import write_config

HOST = socket.gethostname()
TIMEOUT = 3.0  # seconds, of the runs here
SHORT = 1.5  # seconds, where ranks have nothing to do but wait
SPARE = 15.0  # seconds more until all have ended, on a machine that does much else; without the watch it would be 60


# -- the time limit --------------------------------------------------------------------------------------------------


def limits_of_groups(layout: str, seconds: float) -> list[float]:
    import torch
    import torch.distributed as dist

    from parallel.grid import start_grid
    from parallel.layout import Layout

    grid = start_grid(Layout.parse(layout), seconds)
    groups = [grid.tensor.group, grid.context.group, grid.replica_group, grid.model_group, grid.pipeline_group]
    groups += [dist.group.WORLD, *filter(None, [grid.embedding_group])]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize(("layout", "count"), [("tp=2,pp=2", 7), ("cp=2,dp=2", 6)])
def test_every_group_has_the_configured_time_limit(layout: str, count: int) -> None:
    assert run_ranks(4, limits_of_groups, layout, 7.5) == [[7.5] * count] * 4


# -- real runs -------------------------------------------------------------------------------------------------------


def train_to_the_fault(path: str, overrides: list[str], victim: int, fault: str, timeout: float = TIMEOUT) -> str:
    """`session.main` in this rank's place, where the victim does something in the middle of its second step."""
    import torch.distributed as dist

    from parallel.layout import rank_and_world
    from pretrain import runs, session
    from pretrain.data.sources import Sources

    heartbeat.BEAT, heartbeat.LOOK, heartbeat.ANSWER = 0.1, 0.5, 0.5
    rank, world = rank_and_world()
    if rank == victim:
        _arrange(fault)
    config = runs.open_config(path, [*overrides, "data.validation=null", f"parallel.timeout={timeout}"], world)
    try:
        return str(session.main(config, Sources.open(config)))
    except UserError as error:
        if world > 1:
            dist.destroy_process_group()
        return str(error)


def _arrange(fault: str) -> None:
    from parallel.stages import Stage
    from pretrain import saving
    from pretrain.data.chunks import Chunks
    from pretrain.train import Run

    if fault == "stop in forward":
        _on_call(Stage, "forward", 6, lambda: _stop("forward-backward"))  # four micro-batches a step
    if fault == "stop in update":
        _on_call(Run, "update", 2, lambda: _stop("count of targets"))
    if fault == "raise in save":
        _on_call(saving, "held_boxes", 1, _raise)
    if fault == "hold the interpreter":
        _on_call(Run, "update", 2, _hold)
    if fault == "wait by itself":
        _on_call(Run, "_step_data", 5, lambda: threading.Event().wait(60))
    if fault == "wait for data":
        _on_call(Chunks, "tokens", 20, lambda: threading.Event().wait(60))
    _on_call(Heartbeat, "start", 1, lambda beating: STARTED.append(beating))


STARTED: list[Heartbeat] = []


def _on_call(owner: Any, name: str, count: int, action: Callable[..., Any]) -> None:
    """`action` before the count-th call."""
    original, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            action(args[0]) if owner is Heartbeat else action()
        return original(*args, **options)

    setattr(owner, name, call)


def _stop(phase: str) -> None:
    """SIGSTOP, once all others must have read that this rank is in that phase: each has beaten twice since."""
    beating = STARTED[0]
    beating.mark(beating.now.step, phase)
    while (beat := beating._read(beating.rank)) is None or beat.marks != beating.now.marks:
        time.sleep(0.01)
    first = _numbers(beating)
    while any(now < before + 2 for now, before in zip(_numbers(beating), first, strict=True)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGSTOP)


def _numbers(beating: Heartbeat) -> list[int]:
    return [beat.number if beat is not None else 0 for beat in beating._read_all()]


def _raise() -> None:
    raise UserError("the memory has gone")


def _hold() -> None:
    """As native code may: no other thread of this process runs Python for a minute. Its errors go to a file."""
    os.dup2(os.open("held", os.O_WRONLY | os.O_CREAT), 2)
    ctypes.PyDLL(None).sleep(60)


def fault_ends(world: int, function: Callable[..., Any], *args: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the rank that ended first, which ends with exit code 3 in time."""
    return fault_tells(world, function, *args, capsys=capsys)[1]


def fault_tells(
    world: int, function: Callable[..., Any], *args: Any, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """All that this rank wrote, and the line."""
    started = time.monotonic()
    with pytest.raises(RankError, match="ended by itself with exit code 3"):
        run_ranks(world, function, *args, timeout=40)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " the others" in line]
    assert lines and time.monotonic() - started < 30
    assert len({re.sub(r".* the others.*?\): ", "", line) for line in lines}) == 1, "all tell the same"
    return out, lines[0]


def config_of(folder: Path, shards: Path) -> str:
    return str(write_config(folder, shards, **{"every: 100 steps": "every: 2 steps"}))


LAYOUTS = {
    "a pipeline's exchange": (2, ["parallel.pipeline=2", "batch.micro_size=2"], 1, "forward"),
    "a chain of two axes": (4, ["parallel.tensor=2", "parallel.zero=1"], 3, "update"),
}
WAITED = {
    "a pipeline's exchange": r"\w*(recv|send)\w*",
    "reduced gradients": "all_reduce",
    "a chain of two axes": r"\w+",
}
PHASES = {"forward": "forward-backward", "update": "count of targets"}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_stopped_rank_is_named_with_the_collective_that_waits_for_it(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    world, overrides, victim, place = LAYOUTS[case]
    path = config_of(tmp_path, tiny_data)
    line = fault_ends(world, train_to_the_fault, path, overrides, victim, f"stop in {place}", capsys=capsys)
    waiting = rf"step 2, [a-z -]+: waited 3 s for the others \({WAITED[case]} in \w+\): "
    assert re.search(rf"rank [^{victim}] \({HOST}\): {waiting}", line), line
    assert line.endswith(f"rank {victim} ({HOST}) did not answer, its last beat: step 2, {PHASES[place]}"), line


def test_a_rank_that_ended_by_its_own_error_is_named_with_the_error(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fault_ends(2, train_to_the_fault, config_of(tmp_path, tiny_data), [], 1, "raise in save", capsys=capsys)
    assert f"rank 0 ({HOST}): step 3, count of targets: lost the others" in line
    error = "UserError: the memory has gone"
    assert line.endswith(f"rank 1 ({HOST}) ended by itself, its last beat: step 2, save ({error})"), line


def test_a_rank_that_lives_but_hangs_is_named_as_the_one_behind(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the place of every rank, and the stack of the one that tells."""
    arguments = (config_of(tmp_path, tiny_data), [], 1, "wait by itself")
    out, line = fault_tells(2, train_to_the_fault, *arguments, capsys=capsys)
    assert re.search(
        r"step (\d), count of targets: waited 3 s .*rank 1 .* was behind, its last beat: step \1, data$", line
    )
    waiting = rf"rank 0 \({HOST}\): step \d, count of targets \(all_reduce in total_on_host\)"
    behind = rf"rank 1 \({HOST}\): step \d, data \(in \w+\)(; last seen in a collective: \w+ in \w+, step \d)?"
    assert re.search(rf"where the ranks were:\n.*: +{waiting}\n.*: +{behind}\n.*{re.escape(line)}", out), out
    assert re.search(r'rank 0 .*File ".*parallel/grid.py", line \d+, in total_on_host\n', out), out


def test_a_read_that_does_not_end_is_named_by_all_ranks(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its sample, shard and chunk: its rank gives up before the others do."""
    arguments = (config_of(tmp_path, tiny_data), [], 1, "wait for data")
    line = fault_ends(2, train_to_the_fault, *arguments, capsys=capsys)
    held = rf"No batch came for 2\.7 s: the reader is at sample \d+, in {re.escape(str(tiny_data))}/train/shard-00000\.tar, chunk"
    assert re.search(r"rank 0 .*step \d+, count of targets: lost the others", line), line
    ended = rf"rank 1 \({HOST}\) ended by itself, its last beat: step \d+, data"
    assert re.search(rf"{ended}.* \(NoBatch: {held}", line), line


def test_one_process_whose_read_does_not_end_says_where(tmp_path: Path, tiny_data: Path) -> None:
    """No other rank would miss it: it would hang for ever."""
    [told] = run_ranks(1, train_to_the_fault, config_of(tmp_path, tiny_data), [], 0, "wait for data", timeout=40)
    where = rf"{re.escape(str(tiny_data))}/train/shard-00000\.tar, chunk \d+"
    assert re.match(rf"No batch came for 2\.7 s: the reader is at sample \d+, in {where}, and has been ", told), told


def test_a_rank_whose_interpreter_is_held_is_named_and_leaves_its_stack(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It beats no more and can run no Python, so it is faulthandler that writes."""
    monkeypatch.chdir(tmp_path)
    arguments = (config_of(tmp_path, tiny_data), ["parallel.zero=1"], 1, "hold the interpreter")
    line = fault_ends(2, train_to_the_fault, *arguments, capsys=capsys)
    assert re.search(rf"rank 1 \({HOST}\) did not answer, its last beat: step [12]", line), (
        "it is as old as a beat may be"
    )
    assert re.search(
        r'File ".*test_heartbeat.py", line \d+ in _hold\n(.*\n)* +File ".*train.py"', Path("held").read_text()
    )


def test_a_rank_that_never_comes_is_missed(tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fault_ends(2, come_alone, config_of(tmp_path, tiny_data), capsys=capsys)
    assert line.startswith(f"[rank 0] rank 0 ({HOST}): start: waited 1.5 s for the others (in exchange): ")
    assert line.endswith(f"rank 1 of 2 has not come within 1.5 s; here are those of {HOST}")


def come_alone(path: str) -> None:
    if os.environ["RANK"] == "0":
        train_to_the_fault(path, [], -1, "", SHORT)


# -- the watch -------------------------------------------------------------------------------------------------------


def wait_where_nothing_is_raised(victim: int) -> None:
    """As in a collective on a GPU: the main thread waits without end, and the victim is stopped."""
    import torch.distributed as dist

    heartbeat.BEAT, heartbeat.LOOK, heartbeat.ANSWER = 0.1, 0.5, 0.5
    dist.init_process_group("gloo")
    with Heartbeat(dist.get_rank(), dist.get_world_size(), SHORT) as beating:
        beating.start()
        STARTED.append(beating)
        beating.mark(7, "forward-backward")
        dist.barrier()
        if dist.get_rank() == victim:
            _stop("data")
        threading.Event().wait(60)


@pytest.mark.parametrize("victim", [0, 2])
def test_ranks_that_hear_no_error_notice_by_themselves(capsys: pytest.CaptureFixture[str], victim: int) -> None:
    started = time.monotonic()
    line = fault_ends(3, wait_where_nothing_is_raised, victim, capsys=capsys)
    assert time.monotonic() - started < SHORT + SPARE
    assert ": step 7, forward-backward: waited for the others (in wait): " in line
    assert f"rank {victim} ({HOST}) did not answer" in line and line.endswith("its last beat: step 7, data")


def beat_and_end() -> list[str]:
    """Rank 1 ends long before the others, as is its right when it is done."""
    import torch.distributed as dist

    heartbeat.BEAT, heartbeat.LOOK = 0.02, 0.1
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Heartbeat(rank, dist.get_world_size(), 0.1) as beating:
        beating.start()
        dist.barrier()
        if rank != 1:
            while (beat := beating._read(1)) is None or beat.phase != heartbeat.DONE:
                time.sleep(0.01)
            beats = [beating.now.number]
            while len(beats) < 30:  # many times what a rank may be silent
                now = beating._read(rank)
                beats += [now.number] if now is not None and now.number != beats[-1] else []
                time.sleep(0.005)
    return [thread.name for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_rank_that_is_done_is_not_missed_and_no_thread_stays() -> None:
    assert run_ranks(3, beat_and_end) == [[], [], []]


def test_one_process_has_no_watch() -> None:
    with Heartbeat() as beating:
        beating.start()
        beating.mark(1, "data")
    assert beating.store is None and not beating.beats.is_alive()


def test_an_error_that_is_no_lost_rank_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), Heartbeat(0, 2, 1.0):
        raise RuntimeError("shape mismatch")


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_runs_folder_says_where_it_is_while_it_lives_and_how_it_ended(tmp_path: Path) -> None:
    def read() -> dict[str, Any]:
        read: dict[str, Any] = json.loads((tmp_path / pulse.NAME).read_text())
        return read

    def wait_for(step: int) -> dict[str, Any]:
        while not (tmp_path / pulse.NAME).exists() or read()["step"] != step:
            time.sleep(0.01)
        return read()

    pulse.PERIOD = 0.02
    before = time.time()
    with Heartbeat() as beating:
        beating.mark(3, "data")
        beating.show(tmp_path)
        first = wait_for(3)
        while (later := read())["time"] == first["time"]:
            time.sleep(0.01)
        beating.mark(4, "forward-backward")
        last = wait_for(4)
    assert (first["phase"], first["host"], first["pid"]) == ("data", HOST, os.getpid())
    assert before < first["since"] == later["since"] < later["time"] < last["since"] <= last["time"] < time.time()
    assert read()["phase"] == "done" and [path.name for path in tmp_path.iterdir()] == [pulse.NAME]
    with pytest.raises(ZeroDivisionError), Heartbeat() as beating:
        beating.show(tmp_path)
        raise ZeroDivisionError("no loss")
    assert read()["phase"] == "failed: ZeroDivisionError: no loss"


# -- who was first ---------------------------------------------------------------------------------------------------


def beat(number: int, marks: int, phase: str = "data", lost: bool = False, ended: str = "") -> Beat:
    return Beat(number, marks, 1 + marks // 10, phase, f"host{marks}", lost, ended)


BEFORE = [beat(5, 20, "save"), beat(5, 20, "save"), beat(5, 20, "save"), None]
FIRST = {
    "nobody": ([beat(7, 20), beat(7, 20), beat(7, 20), beat(1, 20)], ""),
    "a silent one": (
        [beat(7, 20), BEFORE[1], beat(7, 19), None],
        "rank 1 (host20) did not answer, its last beat: step 3, save",
    ),
    "two silent ones": (
        [beat(7, 20), *BEFORE[1:]],
        "rank 1 (host20) did not answer, its last beat: step 3, save; rank 2",
    ),
    "an error before silence": (
        [beat(7, 20), BEFORE[1], beat(6, 18, ended="OSError: full"), None],
        "rank 2 (host18) ended by itself, its last beat: step 2, data (OSError: full)",
    ),
    "one behind": ([beat(7, 20), beat(7, 21), beat(7, 19), beat(1, 20)], "rank 2 (host19) was behind"),
    "the one of two behind that lost nobody": (
        [beat(7, 19, lost=True), beat(7, 20), beat(7, 19), beat(1, 20)],
        "rank 2 (host19) was behind",
    ),
    "of two behind the one that waits in no collective": (
        [
            beat(7, 20),
            beat(7, 19)._replace(inside="all_reduce in f", collective="all_reduce in f, step 2"),
            beat(7, 19)._replace(inside="in g", collective="all_reduce in f, step 2"),
            beat(1, 20),
        ],
        "rank 2 (host19) was behind, its last beat: step 2, data",
    ),
    "one behind that waits for a disk": (
        [beat(7, 20), beat(7, 21), beat(7, 19)._replace(reads="the reader is at sample 7"), beat(1, 20)],
        "rank 2 (host19) was behind, its last beat: step 2, data (the reader is at sample 7)",
    ),
    "one that is done is not silent": ([beat(7, 20), BEFORE[1]._replace(phase="done"), beat(7, 20), None], ""),
}


@pytest.mark.parametrize(("after", "words"), FIRST.values(), ids=FIRST.keys())
def test_first_to_part_is(after: list[Beat | None], words: str) -> None:
    found = first_to_part(BEFORE, after)
    assert found.startswith(words) and bool(found) == bool(words)
