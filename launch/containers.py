"""One container on each of several hosts, started over ssh and followed until all have ended.

Each line that a container writes comes out here behind its host's name. Ctrl-C, SIGTERM and a closed terminal ask all
containers to stop, so that the ranks save and end together, and so does the end of a host's ssh; a second time kills. When a
container fails, the others can only wait for it: they get some seconds to say what they saw, then they are killed. If ssh or
this process ends, however that is, the script on the host reads the end of its input and stops its container: none goes on
without somebody who follows it.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from launch import ssh
from launch.ranks import SIGNALS, say
from pretrain.errors import Exit

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0  # from a container's failure to the end of the others: they look twice who parted, and tell
KILL_SECONDS = 20.0  # for docker to kill a container and say so

# `stop` again and again, for docker may not have made the container yet. Input of what runs behind & is /dev/null unless
# it is given another, hence descriptor 3.
SCRIPT = """
{exports}
{run} </dev/null &
child=$!
stop() {{
    until docker stop -t {seconds} {name}; do
        kill -0 $child || break
        sleep 1
    done
}}
exec 3<&0
{{
    while read -r word; do
        case $word in
            kill) docker kill {name} ;;
            *) stop & ;;
        esac
    done
    stop
}} <&3 >/dev/null 2>&1 &
follower=$!
wait $child
code=$?
kill $follower 2>/dev/null
exit $code
"""


@dataclass(frozen=True)
class Container:
    """What is to run on a host. `run`: a line of sh that starts the container under this name, in the foreground."""

    host: str
    name: str
    run: str
    exports: str = ""  # lines of sh that set what the container takes from its environment
    stop_seconds: int = 600  # from the wish to stop until docker kills it

    @property
    def script(self) -> str:
        return SCRIPT.format(exports=self.exports, run=self.run, name=shlex.quote(self.name), seconds=self.stop_seconds)


@dataclass
class Followed:
    """A container that was started, and the threads that read what it writes."""

    container: Container
    process: subprocess.Popen[bytes]
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def host(self) -> str:
        return self.container.host

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def follow(self) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        for stream, out in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            self.readers.append(threading.Thread(target=_copy, args=(stream, out, self.host), daemon=True))
            self.readers[-1].start()

    def tell(self, word: str) -> None:
        ssh.send(self.process, f"{word}\n".encode())

    def close(self) -> None:
        """Let go of it: the script on the host stops what is left."""
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(1.0)


def _copy(stream: IO[bytes], out: IO[str], host: str) -> None:
    for line in stream:
        # In one piece, or lines of several hosts would mix. Whoever reads us may have gone; the container goes on.
        with suppress(OSError, ValueError):
            out.write(f"{host}: {line.decode(errors='replace').rstrip()}\n")
            out.flush()


@dataclass
class Containers:
    """The containers of a run."""

    containers: Sequence[Container]
    followed: list[Followed] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # signals that asked to stop
    told: str = ""  # the last word that all were told

    def wait(self) -> int:
        """Start all; wait until all have ended; the exit code of the one that was first to fail, or 0."""
        with self._hearing_signals():
            try:
                for container in self.containers:
                    self.followed.append(Followed(container, ssh.start(container.host, container.script)))
                    self.followed[-1].follow()
                return self._watch()
            finally:
                for each in self.followed:
                    each.close()

    def _watch(self) -> int:
        first: Followed | None = None
        deadline = float("inf")
        while self._running() and time.monotonic() < deadline:
            self._pass_on()
            first = first or self._failed()
            if first is not None and not self.told and first.code == ssh.LOST:
                self._tell_all("stop")  # its ranks may live: then all can save
            if first is not None and not self.told and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_SECONDS
            if self.told == "kill" and deadline == float("inf"):
                deadline = time.monotonic() + KILL_SECONDS
            time.sleep(POLL_SECONDS)
        if first is None or first.code == Exit.PARTED:  # which says that another was first
            first = self._failed()
        left = self._running()
        if left:
            self._tell_all("kill")
        if len(self.asked) > 1:
            return 128 + self.asked[-1]
        if first is None:
            return 0
        self._tell(first, left)
        return Exit.PARTED if first.code == ssh.LOST else first.code or 0

    def _running(self) -> list[Followed]:
        return [each for each in self.followed if each.code is None]

    def _failed(self) -> Followed | None:
        """One that ended with an error: of its own, before one whose ssh ended, before one that only lost another."""
        order = {ssh.LOST: 1, Exit.PARTED: 2}
        failed = [each for each in self.followed if each.code]
        return min(failed, key=lambda each: order.get(each.code or 0, 0), default=None)

    def _tell(self, first: Followed, left: Sequence[Followed]) -> None:
        """Who failed and how; nothing where all ended alike by themselves, since rank 0 has told it."""
        code = first.code or 0
        if all(each.code == code for each in self.followed) and code in (Exit.MISTAKE, Exit.STOPPED):
            return
        waited = ", ".join(each.host for each in left)
        say(f"{first.host} {_how(first)}" + (f"; ended, since they waited for it: {waited}" if left else ""))
        if not self.asked and code != Exit.MISTAKE:
            say("the same command goes on from the last checkpoint, if there is one")

    # -- wishes to stop ----------------------------------------------------------------------------------------------

    @contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def _pass_on(self) -> None:
        if len(self.asked) == 1 and not self.told:
            say("asked all hosts to save and end (once more kills)")
            self._tell_all("stop")
        elif len(self.asked) > 1 and self.told != "kill":
            say("killing the containers of all hosts")
            self._tell_all("kill")

    def _tell_all(self, word: str) -> None:
        self.told = word
        for each in self._running():
            each.tell(word)


def _how(failed: Followed) -> str:
    """How a container ended, from docker's or ssh's exit code."""
    code, name = failed.code or 0, failed.container.name
    if code == ssh.LOST:
        return "was lost: ssh ended; the others were asked to save, and so is its container if the host lives"
    if code == 125:
        return "could not start its container (docker's message is above)"
    if code == 137:
        return f"lost its container {name}: it was killed (SIGKILL, by hand or for memory: dmesg there tells)"
    if code == Exit.PARTED:
        return "gave up waiting for another; which one is told above"
    return f"was first: its container {name} ended with exit code {code}"
