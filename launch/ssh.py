"""Scripts on other machines, by the user's own ssh: its configuration, keys and agent, never a password.

A script goes over ssh's standard input and is run by sh, so that no argument meets the user's login shell, whichever that
is, and nothing of it (values of the environment) stands in a list of processes, here or there. What is written behind it
the script may read; when ssh or this process ends, however that is, it reads the end.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from contextlib import suppress
from typing import IO, NamedTuple

from pretrain.errors import UserError

OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),  # a host that is gone is noticed in a minute
)
LOST = 255  # ssh's own exit code
HOST = re.compile("[A-Za-z0-9_][A-Za-z0-9_.@:-]*")  # never an option
MENDS = {
    "permission denied": "let `ssh {host} true` work without a password (ssh-copy-id, ssh-agent)",
    "host key verification": "run `ssh {host} true` once by hand and compare the key",
    "could not resolve": "is the name right? ~/.ssh/config can give it an address",
    "refused": "is sshd running there, on the port that ~/.ssh/config says?",
    "timed out": "is the machine up, and does a firewall let ssh in?",
}


class Answer(NamedTuple):
    """What a script said until it ended. Times are this machine's, in seconds since 1970."""

    code: int
    started: float
    lines: list[tuple[float, str]]  # of its output, each with the time when it came
    errors: str


def check_host(name: str) -> None:
    """Raises UserError for what ssh could take for an option, or a shell for more than a name."""
    if not HOST.fullmatch(name):
        raise UserError(f"--hosts: {name!r} is no name of a host as ssh takes it")


def start(host: str, script: str) -> subprocess.Popen[bytes]:
    """The script, begun on the host, with its three streams as pipes."""
    content = script.encode()
    # One line without what any login shell would read in it. dd takes the script's bytes and leaves those behind it.
    command = f"exec sh -c 'eval \"$(dd bs=1 count={len(content)} 2>/dev/null)\"'"
    process = subprocess.Popen(
        ["ssh", *OPTIONS, "--", host, command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C reaches the scripts through us alone
    )
    send(process, content)
    return process


def send(process: subprocess.Popen[bytes], content: bytes) -> None:
    """More for the script to read; nothing where it has ended."""
    assert process.stdin is not None
    with suppress(OSError):  # its exit code tells
        process.stdin.write(content)
        process.stdin.flush()


def ask(host: str, script: str, seconds: float) -> Answer:
    """Run the script to its end, which after `seconds` is brought about (exit code -9)."""
    started = time.time()
    process = start(host, script)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    errors: list[bytes] = []
    reader = threading.Thread(target=_read, args=(process.stderr, errors))
    reader.start()
    try:
        lines = [(time.time(), line.decode(errors="replace").rstrip("\n")) for line in process.stdout]
        reader.join()
        return Answer(process.wait(), started, lines, b"".join(errors).decode(errors="replace"))
    finally:
        limit.cancel()
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # what a script that has ended did not read
                stream.close()


def _read(stream: IO[bytes], into: list[bytes]) -> None:
    into.append(stream.read())


def failure(host: str, errors: str) -> str:
    """Why ssh could not reach a host, by its own last words, and the mend."""
    words = [line for line in errors.splitlines() if line.strip()]
    said = words[-1].strip() if words else "no answer"
    mends = [mend for key, mend in MENDS.items() if key in errors.lower()]
    return f"ssh: {said}" + (f"; {mends[0].format(host=host)}" if mends else "")
