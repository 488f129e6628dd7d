"""Stand-ins for `ssh` and `docker` on PATH: hosts that are this machine, with every word that docker was given written down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Runs the command in the user's shell, as sshd does, with HOST in its environment; a host that is called "lost" is not reached.
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
host=$2
shift 2
[ "$host" != lost ] || { echo "ssh: Could not resolve hostname lost: Name or service not known" >&2; exit 255; }
HOST=$host exec ${LOGIN_SHELL:-/bin/sh} -c "$*"
"""

# Writes down its words and environment, then does what is asked of it, or the fault that is planted for the host.
DOCKER = """#!{python} -S
import json, os, signal, subprocess, sys, time
words, host, home = sys.argv[1:], os.environ["HOST"], "{folder}"
with open(f"{{home}}/calls.jsonl", "a") as file:
    file.write(json.dumps([host, words, dict(os.environ)]) + "\\n")
fault = json.load(open(f"{{home}}/faults.json")).get(host, {{}})
if words[0] in fault:
    print(fault[words[0]], file=sys.stderr)
    sys.exit(1)
if words[0] == "version":
    print("20.10.24")
elif words[0] == "ps":
    print(fault.get("leftover", ""))
elif words[0] == "image":
    print(fault.get("identity", "sha256:1234"))
elif words[0] in ("stop", "kill"):
    try:
        pid = int(open(f"{{home}}/{{words[-1]}}.pid").read())
        os.kill(pid, signal.SIGTERM if words[0] == "stop" else signal.SIGKILL)
    except OSError:
        sys.exit(1)
elif "launch.probe" in words and not fault.get("real"):
    print('launch: probe {{"problems": [], "unreached": ""}}')
elif "launch.probe" in words:
    os.execv(sys.executable, [sys.executable, *words[words.index("-m"):]])
else:  # the run's container
    name = next(word for word in words if word.startswith("--name=")).removeprefix("--name=")
    container = subprocess.Popen([sys.executable, "-S", f"{{home}}/container.py"], start_new_session=True)
    with open(f"{{home}}/{{name}}.new", "w") as file:
        file.write(str(container.pid))
    os.rename(f"{{home}}/{{name}}.new", f"{{home}}/{{name}}.pid")
    code = container.wait()
    sys.exit(128 - code if code < 0 else code)
"""

# A container that saves when it is asked to stop; its host may plant other ends.
CONTAINER = """
import os, signal, sys, time
host = os.environ["HOST"]
def save(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("here is", host, flush=True)
open(f"{os.path.dirname(__file__)}/up-{host}-{os.getpid()}", "w").close()
"""


def install(folder: Path) -> Path:
    """Both, in a folder for PATH; the rest of what they need lies beside them."""
    programs = folder / "programs"
    programs.mkdir()
    (folder / "faults.json").write_text("{}")
    (folder / "container.py").write_text(CONTAINER)
    for name, text in (("ssh", SSH), ("docker", DOCKER.format(python=sys.executable, folder=folder))):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs


def calls(folder: Path, first: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Host, words and environment of each call of docker whose first word this is, by host."""
    path = folder / "calls.jsonl"
    every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted((host, words, environment) for host, words, environment in every if words[0] == first)
