"""`python -m launch slurm`: the script that it writes, and that no name does harm. What a job decides when its step has ended:
test_job.py."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from launch import script
from pretrain.__main__ import main as pretrain
from pretrain.config.load import load_config
from tests.distributed import REPOSITORY
from tests.launch.jobs import CONFIG, LAYOUT, SIZE, Slurm, directives, events, launched, rendered

HOSTILE = "a b'\"$(touch hacked)`touch hacked`;touch hacked#\n#SBATCH --time=1\n${HOME}*"


# -- the script --------------------------------------------------------------------------------------------------------


def test_the_script_asks_slurm_for_what_was_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--partition", "gpu,long", "--account", "a1", "--qos", "high", "--constraint", "a100|h100&ib"]
    options += ["--exclude", "n[1-3],n7", "--gpus-per-node", "4", "--time", "2-12:00", "--stop-before", "600"]
    text = rendered(
        capsys, [CONFIG, *options, "--nodes", "2", "parallel.tensor=2", "batch.micro_size=1", "run.dir=my/run"]
    )
    assert directives(text) == {
        "--job-name": "run",
        "--nodes": "2",
        "--ntasks-per-node": "1",
        "--time": "2-12:00",
        "--gpus-per-node": "4",
        "--partition": "gpu,long",
        "--account": "a1",
        "--qos": "high",
        "--constraint": "a100|h100&ib",
        "--exclude": "n[1-3],n7",
        "--mem": "0",
        "--exclusive": "",
        "--requeue": "",
        "--output": "logs/slurm-%j.out",
        "--open-mode": "append",
        "--signal": "B:USR1@600",
    }
    assert "launch\n    node\n" in text and "--processes\n    4\n" in text


def test_a_share_of_a_node_is_asked_for_by_its_cores(capsys: pytest.CaptureFixture[str]) -> None:
    share = ["--cpus", "8", "--memory", "16G", "--processes-per-node", "2", *LAYOUT, "--chain", "3"]
    found = directives(rendered(capsys, [CONFIG, *SIZE, *share]))
    assert (found["--cpus-per-task"], found["--mem"]) == ("8", "16G") and "--exclusive" not in found
    assert "--no-requeue" in found and "--requeue" not in found
    found = directives(rendered(capsys, [CONFIG, *SIZE, *share, "--direct"]))
    assert (found["--ntasks-per-node"], found["--cpus-per-task"]) == ("2", "4")


def test_dry_run_writes_nothing(slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, [CONFIG, *SIZE, *LAYOUT, "run.dir=run"])
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fake"] and not (slurm.folder / "sbatch").exists()


def test_script_and_config_are_their_owners_and_submitted_as_they_lie_there(slurm: Slurm, run: Path) -> None:
    assert stat.S_IMODE((run / "launch" / "job.sh").stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "launch" / "config.yaml").stat().st_mode) == 0o600
    assert (run / "launch" / "config.yaml").read_text() == CONFIG.read_text()
    assert slurm.words("sbatch") == ["--parsable", f"--chdir={run}", f"{run}/launch/job.sh"]
    assert (run / "logs").is_dir()
    assert [line["jobs"] for line in events(run, "submitted")] == [["41"]]


def test_a_chain_is_jobs_one_after_the_other(slurm: Slurm, tmp_path: Path) -> None:
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--chain", "3", "run.dir=run") == 0
    assert [word for word in slurm.words("sbatch") if "dependency" in word] == [
        "--dependency=afterany:41",
        "--dependency=afterany:42",
    ]
    assert [line["jobs"] for line in events(tmp_path / "run", "submitted")] == [["41", "42", "43"]]


def test_a_folder_in_the_hands_of_a_job_is_given_to_no_other(
    slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm.folder / "queue").write_text("41|41|RUNNING|None|n1\n12|12|PENDING|Priority|\n")
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, f"run.dir={run}") == 2
    assert f"{run} is in the hands of job 41" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0", "--time", "5"], ["--nodes: at least 1"]),
        ([*SIZE, "--partition", "gpu --wrap=x"], ["--partition: 'gpu --wrap=x'"]),
        ([*SIZE, "--account", "x\n#SBATCH --uid=0"], ["--account"]),
        ([*SIZE, "--exclude", "$(id)"], ["--exclude"]),
        ([*SIZE, "--seeds", "1;2"], ["--seeds: '1;2' is no list of seeds"]),
        ([*SIZE, "--seeds", "7-3"], ["--seeds: 7-3 is no range"]),
        ([*SIZE, "--seeds", "1-4", "--chain", "2"], ["--chain: an array is no chain"]),
        ([*SIZE, "--at-once", "2"], ["--at-once: is for arrays"]),
        ([*SIZE, "--seeds", "1-2", "--at-once", "0"], ["--at-once: at least 1"]),
        (["--nodes", "2", "--time", "soon"], ["--time: 'soon' is no time limit"]),
        (["--nodes", "2", "--time", "3"], ["--time: 3 leaves nothing before the last 180 s"]),
        ([*SIZE, "--env", "A B=c"], ["--env: 'A B' is no name"]),
        ([*SIZE, "--env", "NOT_SET_ANYWHERE"], ["--env NOT_SET_ANYWHERE: is not set here"]),
        ([*SIZE, "--setup", "no.sh"], ["--setup: no.sh: there is no such file"]),
        ([*SIZE, "--image", "x"], ["--container and --image belong together"]),
        ([*SIZE, "--container", "docker"], ["--container and --image belong together"]),
        ([*SIZE, "--gpus-per-node", "2", "--processes-per-node", "3"], ["--processes-per-node: with GPUs"]),
        ([*SIZE, "--cpus", "3", "--processes-per-node", "4"], ["--cpus: 3 cores"]),
        ([*SIZE, "--max-attempts", "0", "--chain", "0"], ["--max-attempts: at least 1", "--chain: at least 1"]),
        ([*SIZE, "--processes-per-node", "2", "parallel.tensor=3"], ["parallel.tensor: 3 does not divide"]),
        ([*SIZE, "--speed", "2"], ["'--speed'"]),
        ([*SIZE, "run.dir=a%j"], ["run.dir: Slurm reads % in"]),
        ([*SIZE, r"run.dir=a\b"], ["run.dir: Slurm reads \\ in"]),
    ],
    ids=lambda value: " ".join(value)[:40].replace("\n", " "),
)
def test_mistakes_are_told_before_anything_is_written(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    try:
        code: object = launched("slurm", CONFIG, "run.dir=run", *LAYOUT, *options)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and all(word in err for word in words), err
    assert not (tmp_path / "run").exists() and not (slurm.folder / "sbatch").exists()


def test_what_slurm_refuses_is_told(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm.folder / "bin" / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "run.dir=run") == 2
    assert "invalid account" in capsys.readouterr().err
    slurm.monkeypatch.setenv("PATH", "/nowhere")
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "run.dir=run") == 2
    assert "sbatch: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172_800), ("1-12:30", 131_400), ("1-0:0:5", 86_405)]
    + [(text, None) for text in ("", "1:", "1h", "-5", "1:2:3:4", "٣")],
)
def test_time_limits_are_read_as_sbatch_does(text: str, expected: int | None) -> None:
    assert script.seconds(text) == expected


# -- names, variables, containers --------------------------------------------------------------------------------------


def test_hostile_names_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / f"work {HOSTILE.replace('/', '')}"
    work.mkdir()
    monkeypatch.chdir(work)
    slurm = Slurm(tmp_path / "fake", monkeypatch)
    (work / f"{HOSTILE}.yaml").write_text(CONFIG.read_text())
    (work / f"{HOSTILE}.sh").write_text("export FROM_SETUP=yes\n")
    options = [
        "--env",
        f"VALUE={HOSTILE}\\%j",
        "--setup",
        f"{HOSTILE}.sh",
        *LAYOUT,
        f"data.train='{HOSTILE.replace(chr(39), '')}'",
    ]
    run = work / f"run {HOSTILE}"
    assert launched("slurm", f"{HOSTILE}.yaml", *SIZE, *options, f"run.dir={json.dumps(str(run))}") == 0
    assert slurm.words("sbatch") == ["--parsable", f"--chdir={run}", f"{run}/launch/job.sh"]
    text = (run / "launch" / "job.sh").read_text()
    assert directives(text)["--time"] == "1:00:00" and set(directives(text)["--job-name"]) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
    )
    assert slurm.attempt(run, "exit 0") == 0, slurm.told
    environment, words = slurm.environment(), slurm.words("srun")
    assert environment["VALUE"] == f"{HOSTILE}\\%j" and environment["FROM_SETUP"] == "yes"
    assert environment["PWD"] == str(work)
    assert words[words.index("node") + 1] == f"{run}/launch/config.yaml"
    assert f"run.dir={json.dumps(str(run))}" in words and options[-1] in words
    assert not list(tmp_path.rglob("hacked")) and not (REPOSITORY / "hacked").exists()


def test_a_variable_by_name_is_passed_and_written_nowhere(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--env", "TOKEN", "run.dir=run") == 0
    assert slurm.attempt(run, "exit 0") == 0
    assert slurm.environment()["TOKEN"] == "hunter2"
    written = [path for path in run.rglob("*") if path.is_file() and "hunter2" in path.read_text()]
    assert written == [] and "hunter2" not in slurm.told


def test_the_ranks_meet_at_the_first_nodes_address_and_at_another_port_each_time(slurm: Slurm, run: Path) -> None:
    places = []
    for restart in (0, 1):
        slurm.attempt(run, f"save 0000000{restart + 1}; exit 1", restart=restart)
        words = slurm.words("srun")
        assert words[words.index("--nodes") + 1] == "2" and '--node-rank "$SLURM_NODEID"' in " ".join(words)
        places.append(words[words.index("--master") + 1])
    assert places == ["10.0.0.1:20056", "10.0.0.1:20057"]
    assert "--kill-on-bad-exit=1" in words


def test_direct_gives_each_task_the_numbers_of_a_rank(slurm: Slurm, tmp_path: Path) -> None:
    options = ["--processes-per-node", "2", "--direct", *LAYOUT, "run.dir=run"]
    assert launched("slurm", CONFIG, *SIZE, *options) == 0
    variables = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    # The step's own command, with a printing program for Python.
    step = f"""
export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4
while [[ $1 == --* ]]; do shift; done
for name in {variables}; do script+="echo \\"$name=\\$$name\\";"; done
words=("$@"); words[4]=bash; words[5]=-c; words[6]=$script
"${{words[@]:0:7}}" >"$FAKE/rank"
exit 0
"""
    assert slurm.attempt(tmp_path / "run", step) == 0, slurm.told
    words = slurm.words("srun")
    assert words[words.index("bash") + 5 :][:3] == ["-m", "pretrain", "train"]
    expected = [
        "RANK=3",
        "LOCAL_RANK=1",
        "WORLD_SIZE=4",
        "LOCAL_WORLD_SIZE=2",
        "MASTER_ADDR=10.0.0.1",
        "MASTER_PORT=20056",
    ]
    assert (slurm.folder / "rank").read_text().split() == expected


def test_docker_gets_folders_user_and_variables_and_no_more_rights(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    options = ["--container", "docker", "--image", "engine:1", "--env", "A=1", "--gpus-per-node", "2", *LAYOUT]
    assert launched("slurm", CONFIG, *SIZE, *options, "run.dir=run", "data.train=shards") == 0
    assert (
        slurm.attempt(tmp_path / "run", 'echo "$*" | grep -q "docker ps" && exit 0; cp "$FAKE/srun" "$FAKE/step"') == 0
    )
    words = slurm.words("step")
    inner = words[words.index("docker") :]
    image = inner.index("engine:1")
    assert inner[image + 1 : image + 5] == ["python", "-m", "launch", "node"]
    given = inner[:image]
    assert given[:5] == ["docker", "run", "--rm", "--init", "--network=host"]
    assert f"type=bind,source={tmp_path},target={tmp_path}" in given
    assert given[given.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges", "--ulimit=memlock=-1", "A"} <= set(given)
    assert any("--gpus" in word and "SLURM_STEP_GPUS" in word for word in words)
    assert "label=pretrain.job=" in " ".join(slurm.words("srun")), "what a killed client left is removed"


def test_containers_of_one_rank_each_share_the_nodes_memory(capsys: pytest.CaptureFixture[str]) -> None:
    options = [CONFIG, *SIZE, *LAYOUT, "--container", "docker", "--image", "engine:1"]
    for direct, expected in (([], {"--shm-size=16g"}), (["--direct"], {"--ipc=host"})):
        [line] = [
            line for line in rendered(capsys, [*options, *direct]).splitlines() if line.startswith("docker_options=")
        ]
        given = set(line.removeprefix("docker_options=(").removesuffix(")").split())
        assert given & {"--shm-size=16g", "--ipc=host"} == expected and "--ulimit=memlock=-1" not in given


def test_pyxis_gets_its_options_by_srun(slurm: Slurm, tmp_path: Path) -> None:
    options = ["--container", "pyxis", "--image", "host#team/engine:1", "--env", "A=1", *LAYOUT, "run.dir=run"]
    assert launched("slurm", CONFIG, *SIZE, *options) == 0
    assert slurm.attempt(tmp_path / "run", "exit 0") == 0, slurm.told
    words = slurm.words("srun")
    assert {"--container-image=host#team/engine:1", f"--container-mounts={tmp_path}:{tmp_path}"} <= set(words)
    assert {f"--container-workdir={tmp_path}", "--no-container-mount-home"} <= set(words)
    named = next(word for word in words if word.startswith("--container-env=")).partition("=")[2].split(",")
    assert "A" in named


def test_a_folder_that_cannot_be_mounted_is_refused(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--container", "pyxis", "--image", "x") == 2
    assert "cannot be mounted" in capsys.readouterr().err


def test_each_seed_of_an_array_has_its_own_folder(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "ru n\"'"
    words = ("slurm", CONFIG, *SIZE, *LAYOUT, "--seeds", "1-3,9", "--at-once", "2", f"run.dir={json.dumps(str(run))}")
    assert launched(*words) == 0
    text = (run / "launch" / "job.sh").read_text()
    assert directives(text)["--array"] == "1-3,9%2" and directives(text)["--output"] == "logs/slurm-%A_%a.out"
    assert slurm.attempt(run, "exit 0", task=9) == 0, slurm.told
    config = load_config(CONFIG, [word for word in slurm.words("srun") if word.startswith("run.")])
    assert (config.run.seed, config.run.dir) == (9, f"{run}/seed-9")
    assert [line["job"] for line in events(run / "seed-9", "begin")] == ["7_9"]
    assert [line["jobs"] for line in events(run / "seed-3", "submitted")] == [["41_3"]]
    assert slurm.attempt(run, "exit 0", task=5) == 1 and "5 is none of this array" in slurm.told
    assert launched(*words) == 0, "the same again: it goes on"


def test_seeds_are_not_put_among_other_files(slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "thesis.tex").touch()
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--seeds", "1-4", f"run.dir={run}") == 2
    assert "holds other files than seeds" in capsys.readouterr().err


def test_the_trials_of_a_planned_sweep_are_an_array(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    plan = ["sweep", CONFIG, *LAYOUT, "--out", out, "--search", "optimizer.learning_rate=1e-3,2e-3,3e-3", "--plan"]
    assert pretrain([str(word) for word in plan]) == 0
    assert launched("slurm", out, *SIZE) == 0
    assert directives((out / "launch" / "job.sh").read_text())["--array"] == "0-2"
    assert slurm.attempt(out, "exit 0", task=2) == 0, slurm.told
    words = slurm.words("srun")
    config = load_config(
        words[words.index("node") + 1], [word for word in words if "=" in word and "." in word.split("=")[0]]
    )
    assert (config.optimizer.learning_rate, config.run.dir) == (3e-3, f"{out}/trials/2/run")
    assert events(out / "trials" / "2" / "run", "end")[0]["why"] == "finished"
    assert pretrain([str(word) for word in [*plan[:-1], "--keep", "1", "--plan"]]) == 2


@pytest.mark.parametrize("text", ["[]", "{", '["x", 1, 2]', "[[1]]"])
def test_a_plan_that_is_none_is_refused(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "sweep.json").write_text(text)
    assert launched("slurm", tmp_path, *SIZE) == 2 and "is no plan of a sweep" in capsys.readouterr().err
