"""`python -m launch docker`: its command lines, whatever names are in them, and containers that are started, followed and
stopped over ssh. ssh and docker are stand-ins here that run on this machine; tests/cluster has the real ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.__main__ import main, parse
from launch.docker import hosts_of, job_of, mount_of
from launch.job import Mount
from launch.ssh import check_host
from pretrain.errors import UserError
from tests.distributed import REPOSITORY, start_python
from tests.launch import standins
from tests.launch.standins import CONTAINER, calls
from tests.launch.test_local import tiny

HOSTILE = "a b'\"$(touch pwned)`touch pwned`;touch pwned\n&|>pwned \\é,x=1"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user with a config, with the stand-ins on PATH."""
    programs = standins.install(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # of the checking container
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(REPOSITORY / "configs" / "gpt" / "demo.yaml", here / "config.yaml")
    monkeypatch.chdir(here)
    return here


def command(place: Path, *words: str, config: str = "config.yaml", hosts: str = "one,two") -> list[str]:
    overrides = tiny(place, place / "no-shards")
    return ["docker", config, "--hosts", hosts, "--processes", "1", "--master", "127.0.0.1", *overrides, *words]


def plant(place: Path, *hosts: str, **faults: object) -> None:
    (place.parent / "faults.json").write_text(json.dumps(dict.fromkeys(hosts, faults)))


def runs(place: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    return [call for call in calls(place.parent, "run") if "launch.probe" not in call[1]]


# -- command lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_hostile_names_reach_the_container_as_they_are(
    place: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("LOGIN_SHELL", shell)
    plant(place, "one", "two", real=True)
    (place / HOSTILE).mkdir()
    monkeypatch.chdir(place / HOSTILE)
    shutil.copy(place / "config.yaml", HOSTILE.replace("/", "-"))
    mounted = place / f"mount {HOSTILE}"
    mounted.mkdir()
    run = place / HOSTILE / f"run {HOSTILE}"
    words = ["--env", f"GIVEN={HOSTILE}", "--mount", f"{mounted}:/data/{HOSTILE}:ro", f"run.dir={json.dumps(str(run))}"]
    assert main(command(place, *words, config=HOSTILE)) == 0
    assert [host for host, _, _ in runs(place)] == ["one", "two"]
    for rank, (_, call, environment) in enumerate(runs(place)):
        after = call[call.index("pretrain-engine") :]
        assert after[1:3] == ["train", HOSTILE] and after[-1] == words[-1]
        assert f"--workdir={place / HOSTILE}" in call and f"--env=NODE_RANK={rank}" in call
        assert "--env=GIVEN" in call and environment["GIVEN"] == HOSTILE
        (mount,) = (word for word in call if word.startswith("--mount") and "readonly" in word)
        assert mount == Mount(str(mounted), f"/data/{HOSTILE}", True).option
    assert not list(place.parent.rglob("pwned"))


def test_no_value_of_the_environment_stands_in_a_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_TOKEN", "s3cret-value")
    words = ["--env", "API_TOKEN", "--env", "OTHER=s3cret-too"]
    assert main(command(place, *words, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "s3cret" not in shown and "--env=API_TOKEN" in shown and "set there: API_TOKEN, OTHER" in shown
    assert main(command(place, *words)) == 0
    for _, call, environment in calls(place.parent, "run"):
        assert "s3cret" not in " ".join(call)
        assert (environment["API_TOKEN"], environment["OTHER"]) == ("s3cret-value", "s3cret-too")
    assert "s3cret" not in "".join(capsys.readouterr())


def test_dry_run_shows_lines_that_a_shell_takes_and_starts_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, "--dry-run", "--profile", "3")) == 0
    shown = capsys.readouterr().out
    assert calls(place.parent, "run") == [] and not (place / "run").exists()
    assert "2 hosts, 1 processes each; nothing was checked there, nothing was started" in shown
    line = shown.split("# on two:\n")[1]
    subprocess.run(["sh", "-c", line], check=True, env={**os.environ, "HOST": "two"}, timeout=30)
    ((_, call, _),) = runs(place)
    assert call[-1] == "--profile=3" and "--env=NODE_RANK=1" in call and "--env=NNODES=2" in call


def test_a_container_has_no_more_rights_than_it_needs(place: Path) -> None:
    assert main(command(place)) == 0
    for _, call, _ in runs(place):
        assert {"--cap-drop=ALL", "--security-opt=no-new-privileges", "--init", "--rm", "--pull=never"} <= set(call)
        (user,) = (word for word in call if word.startswith("--user"))
        assert user == (f"--user={os.getuid()}:{os.getgid()}" if os.getuid() else "--user=10001:10001")
        assert not any("privileged" in word.replace("no-new-privileges", "") for word in call)
        assert not any(word.startswith("--ulimit") for word in call)  # without GPUs: not every host may raise it
        mounts = [word for word in call if word.startswith(("--mount", "--volume", "-v"))]
        assert mounts == [f"--mount=type=bind,source={place},target={place}"]


def test_gpus_devices_and_user_are_given_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(place, "--dry-run", "--device", "/dev/infiniband", "--user", "1000:5", "batch.size=16")
    words[words.index("--processes") : words.index("--processes") + 2] = ["--gpus", "2"]
    assert main(words) == 0
    for line in capsys.readouterr().out.splitlines()[2::2]:
        for word in (
            "--gpus=2",
            "--env=PROCESSES=2",
            "--ulimit=memlock=-1",
            "--device=/dev/infiniband",
            "--user=1000:5",
        ):
            assert f" {word} " in line


def test_two_runs_have_other_ports_and_names(place: Path) -> None:
    jobs = [job_of(parse(command(place, f"run.dir={place / name}"))) for name in ("a", "b", "a")]
    assert jobs[0].port == jobs[2].port != jobs[1].port
    assert jobs[0].name == jobs[2].name != jobs[1].name


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/data", Mount("/data", "/data")),
        ("/data:ro", Mount("/data", "/data", True)),
        ("/a:b:/c", Mount("/a:b", "/c")),
        ("/a:/c:ro", Mount("/a", "/c", True)),
    ],
)
def test_mounts_are_read(text: str, mount: Mount) -> None:
    assert mount_of(text) == mount


@pytest.mark.parametrize("name", ["-oProxyCommand=touch pwned", "a b", "a;b", "$(a)", "a\nb", "", "a'"])
def test_what_is_no_name_of_a_host_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--hosts"):
        check_host(name)
        hosts_of(name, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "one,two,one"], "--hosts: one twice"),
        (["--exclude", "three"], "--exclude: three is not among --hosts"),
        (["--exclude", "one,two"], "no host is left"),
        (["--env", "1=2"], "--env: NAME or NAME=VALUE"),
        (["--env", "NODE_RANK=1"], "--env: NODE_RANK is set by the launcher"),
        (["--env", "NOT_SET_ANYWHERE"], "--env: NOT_SET_ANYWHERE is not set here"),
        (["--mount", "data"], "--mount: FOLDER[:TARGET][:ro] with whole paths"),
        (["--user", "me"], "--user: UID or UID:GID in numbers"),
        (["--image", "--privileged"], "expected one argument"),
        (["--image=--privileged"], "--image: '--privileged' cannot be one"),
        (["--processes", "0"], "at least 1 on each host"),
        (["run.dir=/elsewhere/run"], "run.dir: /elsewhere/run is in no folder that the containers have"),
        (["run.dir=../run"], "is in no folder that the containers have"),
        (["parallel.tensor=3"], "parallel.tensor: 3 does not divide"),
        (["--gpus", "2"], "not allowed with argument --processes"),
    ],
)
def test_mistakes_are_told_before_any_host_is_asked(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    try:
        code = main(command(place, *words))
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2 and said in told and "Traceback" not in told, told
    assert not (place.parent / "calls.jsonl").exists()


# -- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (
            {"version": "Cannot connect to the Docker daemon"},
            "docker does not answer: Cannot connect to the Docker daemon",
        ),
        (
            {"image": "no such image"},
            "the image pretrain-engine is not there: docker save pretrain-engine | ssh two docker",
        ),
        (
            {"leftover": "beef"},
            "is there already; if it is left from another start: ssh two docker rm --force pretrain-run-",
        ),
        (
            {"run": "could not select device driver with capabilities: [[gpu]]"},
            "install the NVIDIA Container Toolkit there",
        ),
        ({"run": "No module named launch"}, "pretrain-engine is no image of this engine"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_host_that_cannot_train_is_named_and_nothing_starts(
    place: Path, capsys: pytest.CaptureFixture[str], faults: dict[str, str], said: str
) -> None:
    plant(place, "two", **faults)
    assert main(command(place)) == 2
    told = capsys.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("  "))
    assert line.startswith("  two: ") and said in line, told
    assert told.startswith("error: 1 of 2 hosts cannot train, so nothing was started:")
    assert told.endswith("Mend it, or leave it out: --exclude two\n")
    assert runs(place) == []


def test_a_host_that_ssh_does_not_reach_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, hosts="one,lost")) == 2
    told = capsys.readouterr().err
    assert "  lost: ssh: ssh: Could not resolve hostname lost" in told and "~/.ssh/config" in told
    assert "--exclude lost" in told and runs(place) == []
    assert main(command(place, "--exclude", "lost", hosts="one,lost")) == 0
    assert [host for host, _, _ in runs(place)] == ["one"]


# -- following -------------------------------------------------------------------------------------------------------


def launched(place: Path, script: str, *words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, over containers that end as the script says."""
    (place.parent / "container.py").write_text(CONTAINER + script)
    return start_python(["launch", *command(place, *words)], cwd=place, env=dict(os.environ))


def wait_for_containers(place: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := sorted(place.parent.glob("up-*"))) < count:
        assert time.monotonic() < deadline, "the containers did not start"
        time.sleep(0.02)
    return [int(path.name.rpartition("-")[2]) for path in found]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "containers outlived their launcher"
        time.sleep(0.02)


def test_lines_come_out_behind_their_hosts_names(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place)) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["one: here is one", "two: here is two"]
    assert "launch: 2 hosts, 1 processes each, meeting at 127.0.0.1:" in err


def test_the_container_that_fails_first_is_named_and_the_others_end(place: Path) -> None:
    script = "if host == 'two': sys.exit(7)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    (place.parent / "quick.py").write_text(
        "import sys\nfrom launch import __main__, containers\ncontainers.GRACE_SECONDS = 1.0\nsys.exit(__main__.main())"
    )
    (place.parent / "container.py").write_text(CONTAINER + script)
    paths = {"PYTHONPATH": f"{place.parent}:{REPOSITORY}"}
    with start_python(["quick", *command(place)], cwd=place, env={**os.environ, **paths}) as launcher:
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 7, err
    assert "launch: two was first: its container pretrain-run-" in err
    assert "ended with exit code 7; ended, since they waited for it: one" in err
    wait_until_gone(wait_for_containers(place, 2))


def test_a_container_that_was_killed_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place.parent / "container.py").write_text(CONTAINER + "os.kill(os.getpid(), signal.SIGKILL)")
    assert main(command(place, "--exclude", "two")) == 137
    assert "launch: one lost its container pretrain-run-" in (told := capsys.readouterr().err) and "SIGKILL" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_wish_to_stop_has_every_container_save(place: Path, number: signal.Signals) -> None:
    with launched(place, "time.sleep(60)") as launcher:
        pids = wait_for_containers(place, 2)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, err
    assert sorted(line for line in out.splitlines() if "saved" in line) == ["one: saved", "two: saved"]
    assert "asked all hosts to save and end" in err and "was first" not in err
    wait_until_gone(pids)


def test_a_host_whose_ssh_ends_has_the_others_save(place: Path) -> None:
    with launched(place, "if host == 'two': sys.exit(255)\ntime.sleep(60)") as launcher:
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 3 and "one: saved" in out, err
    assert "launch: two was lost: ssh ended; the others were asked to save" in err


def test_no_container_outlives_a_killed_launcher(place: Path) -> None:
    with launched(place, "time.sleep(60)") as launcher:
        pids = wait_for_containers(place, 2)
        launcher.kill()
        wait_until_gone(pids)
    assert [call[1][0] for call in calls(place.parent, "stop")] == ["stop", "stop"]


def test_a_second_ctrl_c_kills_containers_that_do_not_end(place: Path) -> None:
    with launched(place, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)") as launcher:
        pids = wait_for_containers(place, 2)
        launcher.send_signal(signal.SIGINT)
        while len(calls(place.parent, "stop")) < 2:
            time.sleep(0.02)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    wait_until_gone(pids)
