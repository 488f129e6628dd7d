"""What the project says of itself: pins, make targets, and the commands in its guides."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch import __main__ as launch
from pretrain import __main__ as pretrain
from tests.distributed import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GUIDES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
TARGETS = (
    "setup",
    "demo",
    "demo-parallel",
    "finetune-demo",
    "test",
    "test-cluster",
    "check",
    "bench",
    "matrix",
    "torture",
    "fuzz",
    "clean",
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"].values()
    return [*PROJECT["dependencies"], *(requirement for extra in extras for requirement in extra)]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {
        normal(name): version
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False)


def test_every_requirement_is_pinned_exactly_and_fits_its_range() -> None:
    for text in requirements():
        requirement = Requirement(text)
        assert normal(requirement.name) in pins(), f"{text} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins()[normal(requirement.name)]), f"{text}: the pin is outside"


def test_the_command_is_installed_under_its_name() -> None:
    module, function = PROJECT["scripts"]["pretrain"].split(":")
    assert module == "pretrain.__main__" and callable(getattr(pretrain, function))


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target_and_help_names_it(target: str) -> None:
    assert make("-n", target).returncode == 0
    assert f"make {target} " in make("help").stdout


def test_ci_runs_the_checks_and_the_tests() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], timeout=30, check=False).returncode == 0
    words = script.read_text()
    assert all(
        words.index(earlier) < words.index(later)
        for earlier, later in [
            ("export CI=1", "make check"),
            ("make check", "test ARGS="),
            ("test ARGS=", "test-cluster"),
        ]
    )


# -- the guides' commands --------------------------------------------------------------------------------------------


def commands_of(text: str) -> Iterator[list[str]]:
    """Words of each command in fenced sh or bash blocks; continued lines joined, comments and prompts cut off."""
    for block in re.findall(r"^```(?:ba|)sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield words


def guide_commands() -> list[tuple[str, list[str]]]:
    return [(guide.name, words) for guide in GUIDES for words in commands_of(guide.read_text())]


def is_accepted(words: Sequence[str]) -> str:
    """Why the command could not be typed; empty if it could. Nothing is run."""
    if words[0] == "make":
        result = make("-n", *words[1:])
        return "" if result.returncode == 0 else result.stderr
    for program, parse in PARSERS.items():
        names = program.split()
        if list(words[: len(names)]) == names:
            return _exits(parse, [word for word in words[len(names) :] if word != "&"])
    return ""


PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "python -m pretrain": lambda words: pretrain.parse(words),
    ".venv/bin/python -m pretrain": lambda words: pretrain.parse(words),
    "pretrain": lambda words: pretrain.parse(words),
    "python -m launch": lambda words: launch.parse(words),
    ".venv/bin/python -m launch": lambda words: launch.parse(words),
}


def _exits(parse: Callable[[Sequence[str]], object], words: Sequence[str]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse(words)
    except SystemExit as end:
        return "" if not end.code else said.getvalue()
    return ""


@pytest.mark.parametrize(
    ("guide", "words"),
    [pytest.param(guide, words, id=f"{guide}: {shlex.join(words)}"[:80]) for guide, words in guide_commands()],
)
def test_commands_in_the_guides_are_accepted(guide: str, words: list[str]) -> None:
    assert is_accepted(words) == ""
    configs = [Path(word) for word in words if re.fullmatch(r"configs/\S+\.yaml", word)]
    assert [str(path) for path in configs if not (REPOSITORY / path).is_file()] == []


def test_a_wrong_command_in_a_guide_would_be_found() -> None:
    text = "```bash\n$ python -m pretrain trian x.yaml  # a comment\nmake dmeo\npython -m launch local x.yaml\n```\n"
    assert [bool(is_accepted(words)) for words in commands_of(text)] == [True, True, True]


def test_help_shows_an_example_for_every_command() -> None:
    result = _help(pretrain.parser().parse_args, ["--help"])
    names = re.findall(r"^    (\w+) ", result, re.MULTILINE)
    assert {"prepare", "train", "evaluate", "generate"} <= set(names)
    for name in names:
        assert f"example: python -m pretrain {name} " in _help(pretrain.parser().parse_args, [name, "--help"])
    names = re.findall(r"^    (\w+) ", _help(launch.parse, ["--help"]), re.MULTILINE)
    assert {"local", "slurm", "status"} <= set(names)
    for name in names:
        words = " ".join(_help(launch.parse, [name, "--help"]).split())
        assert re.search(rf"example: .*python -m launch {name} ", words)


def _help(parse: Callable[[Sequence[str]], object], words: Sequence[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parse(words)
    return said.getvalue()
