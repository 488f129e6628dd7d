"""Real processes for tests: ranks that talk over gloo, and commands as a user types them.

Eight fresh processes take half a minute to import torch, megatron-core and DeepSpeed. So one warm process
(`tests.zygote`) imports them once a session and forks the ranks of every request; a second one does so for ranks in which
Triton's kernels are interpreted, which is settled when Triton is imported.

    results = run_ranks(4, train_a_little, config)      # train_a_little: a function at the top of a test module
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """What the zygote is asked for. `call` is a pickle of (function, args), opened in the rank alone."""

    world: int
    call: bytes
    timeout: float
    folder: str  # for each rank's output
    cwd: str
    path: list[str]
    environment: dict[str, str]


class Outcome(NamedTuple):
    """How one rank ended; `value` is a pickle of its result, or of its exception (None where it cannot be pickled)."""

    rank: int
    succeeded: bool
    value: bytes | None
    traceback: str


class RankError(AssertionError):
    """A rank failed in a way that has no exception to raise again: killed, out of time, or not picklable."""


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, interpreted: bool = False
) -> list[Any]:
    """`function(*args)` in `world` forked processes with torch.distributed's environment; the result of each rank.

    interpreted: Triton's kernels run in its interpreter. Function, arguments and results must be picklable. The exception
    of the rank that failed first is raised here, with its traceback and output as notes; the other ranks are killed then,
    as they are after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = pickle.dumps((function, args))
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **_INTERPRETED[interpreted], **place}
        request = Request(world, call, timeout, folder, os.getcwd(), list(sys.path), environment)
        outcomes: list[Outcome] = _zygote(interpreted).ask(request)
        failed = [outcome for outcome in outcomes if not outcome.succeeded]
        for outcome in outcomes:
            print(_output(folder, outcome.rank), end="")
        if failed:
            _raise(failed[0], folder)
    return [pickle.loads(outcome.value or b"") for outcome in sorted(outcomes)]


def run_python(
    arguments: Sequence[str | Path],
    cwd: str | Path = REPOSITORY,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` as a user runs it; its exit code, stdout and stderr. env: changes (None removes).

    After `timeout` seconds the command and what it started are killed and subprocess.TimeoutExpired is raised.
    """
    with start_python(arguments, cwd, env) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            error.add_note(f"--- its stdout:\n{out}\n--- its stderr:\n{err}")
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(
    arguments: Sequence[str | Path], cwd: str | Path = REPOSITORY, env: Mapping[str, str | None] | None = None
) -> subprocess.Popen[str]:
    """`python -m ARGUMENTS`, started, for tests that signal or kill it: the leader of a group of its own, which dies
    with the tests."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(env or {})}
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    return Started(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_alone,
    )


def _alone() -> None:
    """A shell has what it starts in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


class Started(subprocess.Popen[str]):
    """As a context, it is killed where a test fails, which would else wait for its end."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self.kill()
        super().__exit__(kind, error, traceback)


_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel end this process by a signal when its parent ends, however that ends."""
    _libc.prctl(PR_SET_PDEATHSIG, number)


_INTERPRETED: dict[bool, dict[str, str]] = {False: {}, True: {"TRITON_INTERPRET": "1"}}


class Zygote:
    """The warm process, and the socket to it."""

    def __init__(self, interpreted: bool) -> None:
        # One thread, since a fork keeps only the thread that forks, and no compiler processes of its own.
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.zygote", str(theirs.fileno())],
                cwd=REPOSITORY,
                env={**os.environ, **alone, **_INTERPRETED[interpreted]},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                preexec_fn=die_with_parent,
            )
        self.connection = Connection(ours.detach())

    def ask(self, request: Request) -> list[Outcome]:
        """The outcomes, failed ones first in the order of their failing."""
        try:
            self.connection.send(request)
            # The ranks' time does not count the zygote's own imports, which only the first request waits for.
            if not self.connection.poll(request.timeout + 120):
                raise RankError("the process that forks the ranks does not answer")
            return self.connection.recv()
        except BaseException as error:  # a Ctrl-C as well: what is under way must not answer the next request
            self.close()
            if isinstance(error, EOFError | OSError):
                raise RankError("the process that forks the ranks died") from error
            raise

    def close(self) -> None:
        """End the process, and with it all ranks."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


_warm: dict[bool, Zygote] = {}  # by whether kernels are interpreted


def _zygote(interpreted: bool) -> Zygote:
    warm = _warm.get(interpreted)
    if warm is not None and not warm.connection.closed and warm.process.poll() is None:
        return warm
    if warm is not None:
        warm.close()
    if not _warm:
        atexit.register(stop_zygotes)
    _warm[interpreted] = Zygote(interpreted)
    return _warm[interpreted]


def stop_zygotes() -> None:
    """End the warm processes; the next request starts another."""
    while _warm:
        _warm.popitem()[1].close()


def _output(folder: str, rank: int) -> str:
    text = (Path(folder) / f"rank-{rank}.out").read_text(errors="replace")
    return "".join(f"[rank {rank}] {line}\n" for line in text.splitlines() if not line.startswith("[Gloo]"))


def _raise(failed: Outcome, folder: str) -> None:
    try:
        error = pickle.loads(failed.value) if failed.value is not None else None
    except Exception:  # an exception class whose arguments are not those of its making
        error = None
    if not isinstance(error, BaseException):
        error = RankError(f"rank {failed.rank}: {failed.traceback.strip().splitlines()[-1]}")
    error.add_note(f"--- rank {failed.rank}:\n{failed.traceback}\n{_output(folder, failed.rank)[-4000:]}")
    raise error
