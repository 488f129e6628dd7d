"""A real Docker engine for the tests, with the engine's image built from docker/Dockerfile, and torn down whole. Needs root,
and Debian's docker.io, docker-compose, mmdebstrap and iproute2 (`make test-cluster` installs them).

Nothing of the machine's own Docker is touched. The image is built by an engine in the machine's network, where packages are
to be had, on a bridge of its own (`--bridge=none` would delete another engine's docker0). Then an engine on the same data
runs in a network namespace, so that no bridge, address or rule meets the machine's. `ip netns exec` would hide the cgroups
from it; nsenter does not.

There is no registry to pull from, so the base image is made here: Debian by mmdebstrap, and torch as pip finds it on this
machine. CLUSTER_CACHE, a folder, keeps all that between sessions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.namespaces import Namespace
from tests.distributed import REPOSITORY, die_with_parent

DOCKER = "/usr/bin/docker"  # Debian's, which has BuildKit; another on PATH may not
IMAGE = "pretrain-engine:test"
CERTIFICATES = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
PACKAGES = "python3,python3-venv,ca-certificates,procps"
TORCH = """
FROM tests/debian
RUN --mount=type=bind,target=/wheels --mount=type=secret,id=ca \\
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi && \\
    python3 -m venv /tmp/pip && \\
    /tmp/pip/bin/pip --no-cache-dir --python /usr/bin/python3 install --break-system-packages --find-links /wheels {pins} && \\
    rm -r /tmp/pip
"""


class Engine:
    """dockerd; `docker` and `compose` run its commands. With a namespace it runs there."""

    def __init__(self, folder: Path, namespace: Namespace | None = None) -> None:
        self.folder, self.namespace = folder, namespace
        self.bridge = f"ptb{os.getpid()}"
        self.environment = {
            **os.environ,
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_BUILDKIT": "1",
            "IMAGE": IMAGE,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self.folder
        options = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
        options += ["--host", f"unix://{folder}/socket"]
        if self.namespace is None:
            subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], check=True)
            subprocess.run(["ip", "address", "add", "198.18.77.1/24", "dev", self.bridge], check=True)
            options += [f"--bridge={self.bridge}", "--iptables=false", "--ip-masq=false"]
        enter = self.namespace.enter if self.namespace else []
        with open(folder / "dockerd.log", "ab") as log:
            self.process = subprocess.Popen(
                [*enter, "dockerd", *map(str, options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        deadline = time.monotonic() + 60
        while self.docker("version", check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < deadline, (folder / "dockerd.log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """End the engine and what it left mounted or linked."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
        for path in (self.folder / "exec" / "netns").glob("*"):
            subprocess.run(["umount", path], check=False, capture_output=True)
        if self.namespace is None:
            subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)

    def docker(
        self, *words: str | Path, check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.run(DOCKER, *words, check=check, timeout=timeout, **options)

    def compose(
        self, *words: str | Path, check: bool = True, timeout: float = 120, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run("docker-compose", *words, check=check, timeout=timeout, environment=environment)

    def run(
        self,
        *words: str | Path,
        check: bool = True,
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        assert not check or ran.returncode == 0, f"{words}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return ran

    def state(self, container: str) -> dict[str, Any]:
        """What docker knows of a container's process: Status, ExitCode, Pid, ..."""
        found: dict[str, Any] = json.loads(self.docker("inspect", "--format", "{{json .State}}", container).stdout)
        return found


@contextlib.contextmanager
def running(folder: Path, namespace: Namespace | None = None) -> Iterator[Engine]:
    engine = Engine(folder, namespace)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def build(engine: Engine) -> None:
    """The image of the working tree; what it is made from only where it is not there yet."""
    images = engine.docker("images", "--format", "{{.Repository}}").stdout.split()
    if "tests/debian" not in images:
        archive = engine.folder / "debian.tar"
        engine.run("mmdebstrap", "--variant=apt", "--mode=root", f"--include={PACKAGES}", suite(), archive, timeout=600)
        engine.docker("import", archive, "tests/debian", timeout=120)
        archive.unlink()
    secrets = [f"--secret=id=ca,src={CERTIFICATES}"] if CERTIFICATES.exists() else []
    if "tests/torch" not in images:
        pins = [
            line
            for line in (REPOSITORY / "constraints.txt").read_text().split()
            if line.startswith(("torch=", "numpy="))
        ]
        wheels = engine.folder / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        engine.run(*pip, *pins, timeout=600)
        (engine.folder / "torch").write_text(TORCH.format(pins=" ".join(pins)))
        context = ["--file", engine.folder / "torch", "--tag", "tests/torch", wheels]
        engine.docker("build", "--network=host", *secrets, *context, timeout=600)
        shutil.rmtree(wheels)
    where = ["--file", REPOSITORY / "docker" / "Dockerfile", "--tag", IMAGE, REPOSITORY]
    engine.docker("build", "--network=host", "--build-arg=BASE_IMAGE=tests/torch", *secrets, *where, timeout=900)


def suite() -> str:
    """Debian's release whose Python is the one that runs the tests, since torch is as pip has it for that one."""
    return {(3, 11): "bookworm", (3, 13): "trixie"}[sys.version_info[:2]]
