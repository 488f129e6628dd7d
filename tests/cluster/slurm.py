"""A real Slurm on this machine for the tests: slurmctld and two slurmd with a munged of their own, on free ports and in a
folder of their own, and torn down whole. Needs root, and Debian's slurm-wlm and munge (`make test-cluster` installs them).

Traps that this avoids: slurmd binds all addresses, so that each node needs a port of its own; a requeued job waits for as
long as a munge credential lives (120 s by default); `sbatch --wait` polls ever more slowly; services must not be the
system's own, which another user of the machine may run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from parallel.ports import free_port
from tests.distributed import REPOSITORY, die_with_parent

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=6
KillWait=5
CompleteWait=0
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
{more}
"""


class Cluster:
    """slurmctld and slurmds; `environment` is what its commands need."""

    def __init__(self, folder: Path, nodes: int = 2, more: str = "") -> None:
        self.folder, self.nodes = folder, [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir(parents=True)
        for node in self.nodes:
            (folder / f"spool.{node}").mkdir()
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.9.{number} Port={free_port()} CPUs=2 RealMemory=2000 "
            "Gres=gpu:2 Feature=fast"
            for number, node in enumerate(self.nodes, start=1)
        ]
        text = CONFIG.format(host=host, folder=folder, port=free_port(), nodes="\n".join(lines), more=more)
        (folder / "slurm.conf").write_text(text)
        for number in range(2):  # stand for GPUs, of which there are none
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu File={folder}/gpu[0-1]\n")

    # -- daemons -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        key, sock = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={sock}", *files)
        self.wait_for(sock.exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%t %D") == f"idle {len(self.nodes)}", "idle nodes")

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As a machine dies: slurmd, its steps' daemons, which are init's children, and all that these started."""
        daemon = self.processes.pop(node)
        tasks = list(processes(SLURMD_NODENAME=node, **self.environment))
        steps = {
            above for above in map(parent, tasks) if Path(f"/proc/{above}/exe").resolve().name.startswith("slurmstepd")
        }
        for pid in [daemon.pid, *steps, *tasks]:  # who would tell of the others' end goes first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def stop(self) -> None:
        """Every job and daemon."""
        with contextlib.suppress(Exception):
            self.ask("scancel", "--full", "--signal=KILL", "--state=RUNNING")
            self.ask("scancel", "--state=PENDING")
            self.ask("scancel", "--state=RUNNING")
            self.wait_for(lambda: not self.ask("squeue", "-h"), "an empty queue", 15)
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        found = shutil.which(program) or f"/usr/sbin/{program}"
        with open(self.folder / f"{name or program}.out", "ab") as out:
            self.processes[name or program] = subprocess.Popen(
                [found, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=die_with_parent,
            )

    # -- commands ----------------------------------------------------------------------------------------------------

    def run(
        self, command: Sequence[str | Path], cwd: Path = REPOSITORY, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command that finds this Slurm."""
        variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **self.environment, **(env or {})}
        words = [str(word) for word in command]
        return subprocess.run(
            words, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
        )

    def ask(self, *command: str) -> str:
        return self.run(command).stdout.strip()

    def state(self, job: str) -> str:
        """Of a job that slurmctld remembers, such as RUNNING; the log of ended ones after that."""
        said = self.ask("scontrol", "show", "job", "-o", job)
        found = [word.partition("=")[2] for word in said.split() if word.startswith("JobState=")]
        return found[0] if found else ""

    def wait_for(self, true: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} in {seconds:g} s\n{self.ask('squeue')}\n{self.told()}")
            time.sleep(0.1)

    def wait_for_state(self, job: str, *states: str, seconds: float = 60.0) -> str:
        self.wait_for(lambda: self.state(job) in states, f"{' or '.join(states)} of job {job}", seconds)
        return self.state(job)

    def told(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(self.folder.glob("*.log"))
        )


def processes(**variables: str) -> dict[int, dict[str, str]]:
    """The environments of all processes that have these variables in it, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            theirs = dict(word.partition("=")[::2] for word in path.read_text(errors="replace").split("\0"))
            if variables.items() <= theirs.items():
                found[int(path.parent.name)] = theirs
    return found


def rank_processes(job: str) -> dict[int, int]:
    """Process id of each rank of a job."""
    return {
        int(variables["RANK"]): pid
        for pid, variables in processes(SLURM_JOB_ID=job).items()
        if "RANK" in variables and b"pretrain\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2, more: str = "") -> Iterator[Cluster]:
    """A cluster that is up, and afterwards gone."""
    made = Cluster(folder, nodes, more)
    try:
        made.start()
        yield made
    finally:
        made.stop()
