"""The command line as a user meets it: exit codes, one message, no traceback, and no other package in ours' place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain import __main__ as command
from pretrain.commands import training
from pretrain.errors import UserError
from tests.distributed import REPOSITORY, run_python, start_python


def is_one_message(stderr: str) -> bool:
    return stderr.count("error: ") == 1 and "Traceback" not in stderr and stderr.endswith("\n")


# -- mistakes, as real processes -------------------------------------------------------------------------------------


def test_a_mistake_exits_2_with_one_message_of_all_problems(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {num_heads: 7}\nbatch: {size: many}\n")
    result = run_python(["pretrain", "train", "wrong.yaml", "optimizer.lerning_rate=1"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert is_one_message(result.stderr) and result.stderr.startswith("error: wrong.yaml: ")
    for path in ("model.hidden_size", "batch.size", "optimizer.lerning_rate"):
        assert result.stderr.count(f"\n  {path}: ") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "wrong.yaml"]


def test_ctrl_c_exits_130_with_one_word(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with start_python(["pretrain", "train", "config.yaml"], cwd=tmp_path) as process:
        writer = open_for(process, tmp_path / "config.yaml")
        # While it reads its config, which does not end. One that comes just before the read begins is heard when it returns.
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        out, err = process.communicate(timeout=10)
        os.close(writer)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def open_for(process: subprocess.Popen[str], pipe: Path) -> int:
    """Open a named pipe for writing as soon as the process reads it; fails if it says something or ends before."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO, error  # nobody reads yet
        spoke, _, _ = select.select([process.stderr], [], [], 0.02)
        assert not spoke, process.communicate()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help-config"]], ids=" ".join)
def test_a_reader_that_has_left_is_no_error(arguments: list[str]) -> None:
    """As with `| head -1`. Output is buffered, as it is unless PYTHONUNBUFFERED is set."""
    with start_python(["pretrain", *arguments], env={"PYTHONUNBUFFERED": None}) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 141)


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_another_package_in_the_place_of_ours_is_named(tmp_path: Path, name: str) -> None:
    """PyPI has a `kernels`, ROS a `launch`: either may come first on the path."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the other package was imported')\n")
    path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    result = run_python(["pretrain", "train", "--help-config"], cwd=tmp_path, env={"PYTHONPATH": path})
    assert (result.returncode, result.stdout) == (2, "")
    assert is_one_message(result.stderr)
    assert f"the package {name!r} is another one, in {tmp_path / name}" in result.stderr
    assert f"this program's own is in {REPOSITORY}" in result.stderr and "virtual environment" in result.stderr


def test_a_missing_package_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain").symlink_to(REPOSITORY / "pretrain")
    code = "import sys; from pretrain import __main__ as m; m.__file__ = sys.argv[1]; sys.exit(m.main(['--help']))"
    # -I -S and a path of one folder: nothing of this checkout is found but `pretrain`.
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    here = str(tmp_path / "pretrain" / "__main__.py")
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, here],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2 and is_one_message(result.stderr)
    assert "the package 'kernels' is missing" in result.stderr


# -- the same without processes --------------------------------------------------------------------------------------


def main(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str, str]:
    try:
        code = command.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "x.yaml"], "invalid choice: 'trian' (choose from"),
        ([], "the following arguments are required: COMMAND"),
        (["train", "x.yaml", "--steps", "3"], "unrecognized arguments: --steps"),
        (["train", "x.yaml", "--profile", "3", "--steps=3", "a=1"], "unrecognized arguments: --steps=3"),
        (["inspect", "runs/x", "a=1"], "unrecognized arguments: a=1"),
        (["generate", "runs/x", "--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (
            ["train"],
            "name a config file or a run's folder, for example: python -m pretrain train configs/gpt/demo.yaml",
        ),
        (["train", "no.yaml"], "no.yaml: there is no such file"),
        (["train", "a=1"], "a=1: there is no such file"),
        (["tensorboard", "runs/none", "runs/nor-this"], "no TensorBoard files in runs/none, runs/nor-this"),
    ],
)
def test_wrong_arguments_exit_2_with_one_message(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = main(capsys, arguments)
    assert (code, out) == (2, "")
    assert is_one_message(err) and words in err


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [(UserError("no\n  room"), 2, "error: no\n  room\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_what_a_command_raises_is_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, stderr: str
) -> None:
    def fail(args: object) -> int:
        raise raised

    monkeypatch.setattr(training, "_train", fail)
    assert main(capsys, ["train", "x.yaml"]) == (code, "", stderr)


def test_a_fault_of_the_programs_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ValueError("a fault")

    monkeypatch.setattr(training, "_train", fail)
    with pytest.raises(ValueError, match="a fault"):
        command.main(["train", "x.yaml"])


def test_the_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_train", lambda args: 3)
    assert command.main(["train", "x.yaml"]) == 3
    monkeypatch.setattr(sys, "argv", ["pretrain", "train", "x.yaml"])
    assert command.main() == 3


def test_overrides_may_stand_before_and_after_the_options() -> None:
    args = command.parse(["train", "x.yaml", "a.b=1", "--profile", "3", "c.d=2", "e.f=3"])
    assert (args.config, args.overrides, args.profile) == ("x.yaml", ["a.b=1", "c.d=2", "e.f=3"], 3)
    assert command.parse(["train", "x.yaml", "--profile"]).profile == 5
    assert command.parse(["train", "x.yaml"]).profile is None


def test_help_exits_0_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = main(capsys, ["--help"])
    assert (code, err) == (0, "")
    names = set(re.findall(r"^ +([a-z]+)(?:  |$)", out, re.MULTILINE))
    assert names >= {"prepare", "train", "evaluate", "generate", "inspect", "tensorboard"}


def test_every_option_says_what_it_does() -> None:
    parsers = command.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert isinstance(parsers, dict)
    silent = [
        f"{name} {action.metavar or action.dest}"
        for name, parser in parsers.items()
        for action in parser._actions
        if not action.help
    ]
    assert silent == []
