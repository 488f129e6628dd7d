"""docker/ and `python -m launch docker` with a real engine, real containers and a real sshd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import attempts
from parallel.ports import free_port
from tests.cluster.docker import IMAGE, Engine
from tests.distributed import REPOSITORY, die_with_parent
from tests.launch.test_docker import HOSTILE
from tests.pretrain.running import command
from tests.training import write_config

USER = 10001  # the image's
STOPPED = 75
COMPOSE = REPOSITORY / "docker" / "compose.yml"


@pytest.fixture
def work(tmp_path: Path, tiny_data: Path) -> Path:
    """A folder for containers, whose user may write it: config.yaml, shards, and runs to be."""
    folder = tmp_path / "work"
    shutil.copytree(tiny_data, folder / "shards")
    write_config(folder, Path("shards"), **{str(folder / "run"): "run", "micro_size: 1": "micro_size: 2"})
    give_away(folder)
    return folder


def give_away(folder: Path) -> None:
    subprocess.run(["chown", "-R", f"{USER}:{USER}", folder], check=True)
    folder.chmod(0o755)


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> list[dict[str, Any]]:
    """The steps of the same run on two processes of this machine."""
    folder = tmp_path_factory.mktemp("local")
    config = write_config(folder, tiny_data, **{"micro_size: 1": "micro_size: 2"})
    ran = command("train", config, world=2)
    assert ran.code == 0, ran.told
    return steps_of(folder / "run")


def steps_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [line for line in lines if "loss" in line]


def assert_same_steps(run: Path, expected: list[dict[str, Any]]) -> None:
    found = steps_of(run)
    for field in ("step", "samples", "batch_hash"):
        assert [line[field] for line in found] == [line[field] for line in expected]
    for field in ("loss", "grad_norm"):
        assert [line[field] for line in found] == pytest.approx([line[field] for line in expected], rel=1e-5)


def wait_for(what: str, done: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


# -- the image -------------------------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_and_holds_only_the_program(engine: Engine) -> None:
    look = """
        id --user; whoami; pwd
        touch /opt/engine/bin/x /usr/bin/x /work/configs/x 2>/dev/null && echo WRITABLE
        find /run/secrets /root/.cache -type f 2>/dev/null
        python -c 'import pretrain, launch, torch; print(pretrain.__file__)'
        python -m pretrain --help > /dev/null && python -m launch --help > /dev/null && echo helped
    """
    told = engine.docker("run", "--rm", IMAGE, "bash", "-c", look).stdout.split("\n")
    assert told[:3] == [str(USER), "engine", "/work"]
    assert "WRITABLE" not in told and told[3].startswith("/opt/engine/lib/python") and told[4:] == ["helped", ""]
    history = engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE).stdout
    assert "BEGIN CERTIFICATE" not in history and "/run/secrets" in history  # named, never kept


def test_any_user_has_a_name_and_a_home(engine: Engine) -> None:
    look = "import getpass, os; print(getpass.getuser(), os.access(os.path.expanduser('~'), os.W_OK))"
    told = engine.docker("run", "--rm", "--user=4321:4321", IMAGE, "python", "-c", look).stdout
    assert told == "user True\n"


def test_a_mistake_in_a_container_is_one_message(engine: Engine) -> None:
    ran = engine.docker("run", "--rm", IMAGE, "train", "configs/gpt/demo.yaml", "model.hiden_size=1", check=False)
    assert ran.returncode == 2 and "model.hidden_size" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["hadolint", "docker/Dockerfile"],
        ["shellcheck", "docker/entrypoint.sh", ".ci/cluster", ".ci/run"],
        ["shfmt", "-d", "-i", "4", "docker/entrypoint.sh"],
        ["docker-compose", "--file", "docker/compose.yml", "config", "--quiet"],
        ["docker-compose", "--file", "docker/compose.gpu.yml", "config", "--quiet"],
    ],
    ids=lambda words: f"{words[0]} {words[-1] if words[0] != 'docker-compose' else words[2]}",
)
def test_files_are_without_complaint(words: list[str]) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        words, cwd=REPOSITORY, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr


# -- compose ---------------------------------------------------------------------------------------------------------


def test_compose_builds_the_image(engine: Engine, tmp_path: Path) -> None:
    """From what the engine has kept: nothing is to be had from its network."""
    override = tmp_path / "override.json"
    override.write_text(json.dumps({"services": {"data": {"build": {"network": "host"}}}}))  # as what was kept
    built = {
        "BASE_IMAGE": "tests/torch",
        "PIP_EXTRA_INDEX_URL": "",
        "COMPOSE_DOCKER_CLI_BUILD": "1",
        "PATH": "/usr/bin:/bin",
    }
    engine.compose("--file", COMPOSE, "--file", override, "build", environment=built)
    assert engine.docker("run", "--rm", IMAGE, "id", "--user").stdout == f"{USER}\n"


class Project:
    """docker/compose.yml with the config and shards of a test."""

    def __init__(self, engine: Engine, work: Path) -> None:
        self.engine, self.work = engine, work
        self.name = f"compose{os.getpid()}"
        self.override = work.parent / "override.json"
        self.files = ["--project-name", self.name, "--file", COMPOSE, "--file", self.override]
        self.set()

    def set(self, *overrides: str) -> None:
        node = {"command": ["train", "config.yaml", *overrides], "volumes": [f"{self.work}:/work"]}
        data = {"volumes": node["volumes"]}
        self.override.write_text(json.dumps({"services": {"data": data, "node-0": node, "node-1": node}}))

    def up(self) -> None:
        self.engine.compose(*self.files, "up", "--no-build", "--detach", timeout=180)

    def down(self) -> None:
        self.engine.compose(*self.files, "down", "--volumes", "--timeout", "0")

    def container(self, rank: int) -> str:
        return self.engine.compose(*self.files, "ps", "--quiet", f"node-{rank}").stdout.strip()

    def codes(self, seconds: float = 90) -> list[int]:
        """Exit codes, once both have ended."""
        containers = [self.container(rank) for rank in range(2)]
        wait_for(
            "both containers end",
            lambda: all(self.engine.state(each)["Status"] == "exited" for each in containers),
            seconds,
        )
        return [self.engine.state(each)["ExitCode"] for each in containers]

    def logs(self) -> str:
        return self.engine.compose(*self.files, "logs", "--no-color").stdout


@pytest.fixture
def project(engine: Engine, work: Path) -> Iterator[Project]:
    made = Project(engine, work)
    try:
        yield made
    finally:
        made.down()


def test_two_containers_train_as_two_local_processes_do(
    project: Project, work: Path, expected: list[dict[str, Any]]
) -> None:
    project.up()
    assert project.codes() == [0, 0], project.logs()
    assert_same_steps(work / "run", expected)
    assert re.search(r"node-0_1 .*finished: 10 steps", project.logs())


def test_a_container_that_is_stopped_saves_and_one_that_is_killed_is_named(project: Project, work: Path) -> None:
    project.set("schedule.total=1000000 steps", "parallel.timeout=10", "checkpoint.every=100000 steps")
    project.up()
    wait_for("some steps", lambda: len(steps_of(work / "run")) >= 3)
    project.engine.docker("kill", "--signal=TERM", project.container(1))  # what docker stop sends first
    assert project.codes() == [STOPPED, STOPPED], project.logs()
    (saved,) = (work / "run" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    project.up()  # the same command goes on
    wait_for("more steps", lambda: steps_of(work / "run")[-1]["step"] >= step + 3)
    assert [line["step"] for line in steps_of(work / "run")][: step + 3] == list(range(1, step + 4))
    project.engine.docker("kill", project.container(1))
    killed = time.monotonic()
    assert project.codes() == [3, 137], project.logs()
    assert time.monotonic() - killed < 30
    assert re.search(
        r"rank 0 \(node-0\): step \d+, .*lost the others.*: rank 1 \(node-1\) did not answer", project.logs()
    )


# -- over ssh --------------------------------------------------------------------------------------------------------

SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
SetEnv DOCKER_HOST={docker} PATH=/usr/bin:/bin
"""
SSH_CONFIG = """
Host one two
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known
    StrictHostKeyChecking yes
"""


class Hosts:
    """`python -m launch docker` in the engine's network, where sshd is two hosts: `one` and `two`."""

    def __init__(self, engine: Engine, folder: Path, work: Path) -> None:
        self.engine, self.folder = engine, folder
        self.work = work.rename(work.with_name(HOSTILE))
        self.programs = folder / "programs"

    def command(self, *words: str) -> list[str]:
        """The first container's address is the engine's own, which is not loopback."""
        assert self.engine.namespace is not None
        launch = [sys.executable, "-m", "launch", "docker", "config.yaml", "--hosts", "one,two", "--processes", "1"]
        options = ["--image", IMAGE, "--master", "172.17.0.1", "--shm-size", "64m"]
        return [*self.engine.namespace.enter, *launch, *options, *words]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @contextlib.contextmanager
    def launched(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            self.command(*words),
            cwd=self.work,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def containers(self) -> list[str]:
        return self.engine.docker("ps", "--all", "--format", "{{.Names}}").stdout.split()


@pytest.fixture
def hosts(engine: Engine, work: Path) -> Iterator[Hosts]:
    folder = Path(tempfile.mkdtemp(prefix="sshd-"))
    port = free_port()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    key = (folder / "key.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key}")
    (folder / "sshd").write_text(SSHD.format(port=port, folder=folder, docker=engine.environment["DOCKER_HOST"]))
    (folder / "ssh").write_text(SSH_CONFIG.format(port=port, folder=folder))
    (folder / "programs").mkdir()
    (folder / "programs" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh "$@"\n')
    (folder / "programs" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
    assert engine.namespace is not None
    sshd = subprocess.Popen(
        [*engine.namespace.enter, "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd")],
        stderr=open(folder / "log", "wb"),  # noqa: SIM115
        preexec_fn=die_with_parent,
    )
    try:
        wait_for("sshd", lambda: b"listening" in (folder / "log").read_bytes(), 10)
        yield Hosts(engine, folder, work)
    finally:
        sshd.kill()
        sshd.wait()
        shutil.rmtree(folder)


def test_hosts_over_ssh_are_checked_and_train_as_two_local_processes_do(
    hosts: Hosts, expected: list[dict[str, Any]]
) -> None:
    hosts.work.chmod(0o755)
    subprocess.run(["chown", "root:root", hosts.work], check=True)
    refused = hosts.launch()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    for host in ("one", "two"):
        assert f"  {host}: user 10001:10001 cannot write {hosts.work}/run: Permission denied" in refused.stderr
    absent = hosts.launch("--image", "no-such-image")
    assert absent.returncode == 2 and "  two: the image no-such-image is not there: docker save" in absent.stderr
    give_away(hosts.work)
    ran = hosts.launch("--env", "WITHIN=a b'$(touch pwned)")
    assert ran.returncode == 0, ran.stderr
    assert re.search("^one: finished: 10 steps", ran.stdout, re.MULTILINE), ran.stdout
    assert_same_steps(hosts.work / "run", expected)
    assert [line["code"] for line in attempts.read(hosts.work / "run") if line["event"] == "end"] == [
        0
    ]  # for launch status
    assert hosts.containers() == [] and not list(hosts.work.parent.rglob("pwned"))


def test_ctrl_c_saves_on_all_hosts_and_no_container_outlives_its_launcher(hosts: Hosts) -> None:
    words = ["schedule.total=1000000 steps", "checkpoint.every=100000 steps"]
    run = hosts.work / "run"
    with hosts.launched(*words) as launcher:
        wait_for("some steps", lambda: len(steps_of(run)) >= 3 or launcher.poll() is not None)
        assert len(hosts.containers()) == 2
        launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == STOPPED, out + err
    assert hosts.containers() == []
    (saved,) = (run / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    with hosts.launched(*words) as launcher:
        wait_for("more steps", lambda: steps_of(run)[-1]["step"] >= step + 3 or launcher.poll() is not None)
        launcher.kill()
    wait_for("the containers end", lambda: hosts.containers() == [], 60)
    assert len(list((run / "checkpoints").glob("step-*"))) == 2, "they were to save"
