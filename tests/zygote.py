"""The warm process of `tests.distributed`: imports the heavy libraries once, then forks ranks on request.

It must stay a process of one thread that never ran a parallel region, or the forked ranks would wait for threads that
they do not have.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import select
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from parallel.ports import free_port
from tests.distributed import Outcome, Request, die_with_parent

# What most ranks run; to import it takes a rank as long as a short training.
PROGRAM = (
    *("pretrain.__main__", "pretrain.session", "pretrain.board", "pretrain.verify"),
    *("pretrain.evaluate", "pretrain.generate", "pretrain.inspect", "tests.pretrain.running"),
    *("webdataset", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
    "deepspeed.runtime.superoffload.superoffload_stage3",
)


def main() -> None:
    """Answer requests until the tests end. A Ctrl-C is the tests' to handle: they end this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    _import()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_Ranks(request).run())


def _import() -> None:
    import torch
    from megatron.core import parallel_state, pipeline_parallel

    from parallel import library

    assert parallel_state and pipeline_parallel
    library.import_deepspeed(torch.cuda.is_available())
    for module in PROGRAM:
        importlib.import_module(module)
    # Half a million objects, which each rank's garbage collector would go through, copying the pages that they lie in.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"imports left {threads} threads: forked ranks would hang"


class _Ranks:
    """The ranks of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.port = free_port()
        self.outcomes: dict[int, Outcome] = {}
        self.running: dict[int, int] = {}  # process id -> rank
        # Ranks write their number to `reports` when their outcome lies in its file, then wait for `leave` to close:
        # rank 0 serves the others' rendezvous, and must not go while one still speaks to it.
        self.reports, self.reports_end = os.pipe()
        self.leave, self.leave_end = os.pipe()

    def run(self) -> list[Outcome]:
        """All outcomes, or those up to a failure: what died without a word first, then failures in their order."""
        deadline = time.monotonic() + self.request.timeout
        try:
            for rank in range(self.request.world):
                self._fork(rank)
            while len(self.outcomes) < self.request.world:
                if not self._wait(min(0.1, max(0.0, deadline - time.monotonic()))):
                    time.sleep(0.2)  # a rank that died is seen dead a little after its peers see it gone
                    self._wait(0)
                    break
                if time.monotonic() > deadline:
                    self._fail_waiting()
                    break
        finally:
            self._end()
        return sorted(self.outcomes.values(), key=lambda outcome: (outcome.succeeded, outcome.value is not None))

    def _fork(self, rank: int) -> None:
        pid = os.fork()
        if pid == 0:
            os.close(self.leave_end)
            _be_rank(rank, self)
        os.setpgid(pid, pid)  # its own group, to be killed with what it starts
        self.running[pid] = rank

    def _wait(self, seconds: float) -> bool:
        """Take in what ranks report and which have died; False once one has failed."""
        reported = select.select([self.reports], [], [], seconds)[0]
        for pid, rank in list(self.running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.running[pid]
                how = os.waitstatus_to_exitcode(status)
                words = f"was killed by signal {-how}" if how < 0 else f"ended by itself with exit code {how}"
                self.outcomes[rank] = Outcome(rank, False, None, f"the process {words}")
                return False
        for rank in os.read(self.reports, 4096) if reported else b"":
            self.outcomes[rank] = pickle.loads(_outcome_file(self.request, rank).read_bytes())
            if not self.outcomes[rank].succeeded:
                return False
        return True

    def _fail_waiting(self) -> None:
        for rank in self.running.values():
            if rank not in self.outcomes:
                waited = f"not done after {self.request.timeout} seconds"
                self.outcomes[rank] = Outcome(rank, False, None, waited)

    def _end(self) -> None:
        """Let ranks that are done leave, kill the others, and wait until all are gone with what they started."""
        done = len(self.outcomes) == self.request.world and all(o.succeeded for o in self.outcomes.values())
        for end in (self.reports, self.reports_end, self.leave, self.leave_end):
            os.close(end)
        for pid in self.running:
            if not done:
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _be_rank(rank: int, ranks: _Ranks) -> NoReturn:
    """The forked process, to its end."""
    request = ranks.request
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _enter(request, rank, ranks.port)
        try:
            import torch

            torch.set_num_threads(1)
            function, args = pickle.loads(request.call)
            outcome = Outcome(rank, True, pickle.dumps(function(*args)), "")
        except BaseException as error:
            outcome = Outcome(rank, False, _pickled(error), traceback.format_exc())
        _outcome_file(request, rank).write_bytes(pickle.dumps(outcome))
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(ranks.reports_end, bytes([rank]))
        os.read(ranks.leave, 1)
    finally:
        os._exit(0)  # not through the zygote's own frames; threads of the test's must not keep the rank


def _enter(request: Request, rank: int, port: int) -> None:
    """Folder, output, search path and environment of this rank."""
    out = os.open(Path(request.folder) / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(request.cwd)
    sys.path[:] = request.path
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.clear()
    os.environ.update({**request.environment, **place, **fixed})


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:
        return None


def _outcome_file(request: Request, rank: int) -> Path:
    return Path(request.folder) / f"rank-{rank}.outcome"


if __name__ == "__main__":
    main()
