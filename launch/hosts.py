"""What is checked on each host before a run starts there, all hosts at once, within a minute: ssh, engine, image, clock,
leftovers, folders, and, in a container as the run's will be, GPUs, disk, and that the hosts reach each other on the run's
port and share its folder (launch/probe.py). Each problem names its host and the mend.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from launch import ssh
from pretrain.errors import UserError

SECONDS = 55.0  # for all checks of a host
CLOCK_SECONDS = 1.0  # that two hosts' clocks may lie apart
MARK = "launch:"  # before each line of ours, among what a login shell may write

SCRIPT = """
echo "launch: clock $(date +%s.%N)"
command -v docker >/dev/null 2>&1 || {{ echo "launch: engine none"; exit 0; }}
version=$(docker version --format '{{{{.Server.Version}}}}' 2>&1) || {{
    echo "launch: engine error $(echo "$version" | tr '\\n' ' ')"
    exit 0
}}
echo "launch: engine $version"
{folders}
echo "launch: leftover $(docker ps --all --quiet --filter name={filter})"
identity=$(docker image inspect --format '{{{{.Id}}}}' {image} 2>/dev/null) || {{ echo "launch: image none"; exit 0; }}
echo "launch: image $identity"
{probe}
"""


@dataclass(frozen=True)
class Subject:
    """A host, and what is to be checked there."""

    host: str
    name: str  # of the container to be
    image: str
    folders: Sequence[str]  # that will be mounted
    probe: str  # a line of sh: the container that checks the rest


@dataclass
class Facts:
    """What a host said of itself."""

    code: int
    errors: str
    offset: tuple[float, float] | None = None  # bounds of its clock less ours, in seconds
    engine: str = ""  # empty: nothing was said
    image: str = ""
    leftover: str = ""
    missing: list[int] = field(default_factory=list)  # of the folders, by their place
    found: list[str] = field(default_factory=list)  # by the probe
    unreached: str = ""
    probed: bool = False


def check(subjects: Sequence[Subject]) -> None:
    """Raises UserError with everything that keeps these hosts from training together."""
    with ThreadPoolExecutor(len(subjects)) as pool:
        facts = list(pool.map(_facts, subjects))
    problems = [list(_problems(subject, found)) for subject, found in zip(subjects, facts, strict=True)]
    for across in (_clocks, _images, _unreached):
        for own, more in zip(problems, across(subjects, facts), strict=True):
            own.extend(more)
    told = [f"  {subject.host}: {problem}" for subject, own in zip(subjects, problems, strict=True) for problem in own]
    if told:
        raise UserError("\n".join([_summary(subjects, problems), *told, *_advice(subjects, problems)]))


def _summary(subjects: Sequence[Subject], problems: Sequence[Sequence[str]]) -> str:
    count = sum(map(bool, problems))
    return f"{count} of {len(subjects)} hosts cannot train, so nothing was started:"


def _advice(subjects: Sequence[Subject], problems: Sequence[Sequence[str]]) -> Iterator[str]:
    bad = [subject.host for subject, own in zip(subjects, problems, strict=True) if own]
    if len(bad) < len(subjects):
        yield f"Mend it, or leave {'it' if len(bad) == 1 else 'them'} out: --exclude {','.join(bad)}"


# -- asking ----------------------------------------------------------------------------------------------------------


def script(subject: Subject) -> str:
    """What a host is asked, in sh."""
    folders = "\n".join(
        f'[ -e {shlex.quote(folder)} ] || echo "launch: missing {number}"'
        for number, folder in enumerate(subject.folders)
    )
    return SCRIPT.format(
        folders=folders,
        filter=shlex.quote(f"^/{subject.name}$"),
        image=shlex.quote(subject.image),
        probe=subject.probe,
    )


def _facts(subject: Subject) -> Facts:
    return read(ssh.ask(subject.host, script(subject), SECONDS))


def read(answer: ssh.Answer) -> Facts:
    """What a host's answer says."""
    facts = Facts(answer.code, answer.errors)
    for came, line in answer.lines:
        if not line.startswith(MARK):
            continue
        key, _, value = line.removeprefix(MARK).strip().partition(" ")
        if key == "clock":
            there = float(value.rstrip(".%N"))  # of a date that knows no nanoseconds
            facts.offset = (there - came, there - answer.started)
        elif key == "missing":
            facts.missing.append(int(value))
        elif key == "probe":
            told = json.loads(value)
            facts.found, facts.unreached, facts.probed = told["problems"], told["unreached"], True
        elif key in ("engine", "image", "leftover"):
            setattr(facts, key, value)
    return facts


# -- judging ---------------------------------------------------------------------------------------------------------


def _problems(subject: Subject, facts: Facts) -> Iterator[str]:
    """Of one host by itself."""
    if facts.code == ssh.LOST:
        yield ssh.failure(subject.host, facts.errors)
    elif facts.engine == "none":
        yield "docker is not installed there, or not on the PATH of commands over ssh"
    elif facts.engine.startswith("error"):
        yield (
            f"docker does not answer: {facts.engine.removeprefix('error').strip()}; does the engine run, and is the user "
            "of ssh in the group docker?"
        )
    elif facts.engine:
        yield from _engine_problems(subject, facts)
    elif facts.code:
        yield f"did not answer within {SECONDS:.0f} s" if facts.code < 0 else f"sh failed: {_last(facts.errors)}"


def _engine_problems(subject: Subject, facts: Facts) -> Iterator[str]:
    missing = [subject.folders[number] for number in facts.missing]
    yield from (f"{folder} is not there; share or copy it, or mount another with --mount" for folder in missing)
    if facts.leftover:
        yield (
            f"a container {subject.name} is there already; if it is left from another start: "
            f"ssh {subject.host} docker rm --force {subject.name}"
        )
    if facts.image == "none":
        image = shlex.quote(subject.image)
        yield f"the image {image} is not there: docker save {image} | ssh {subject.host} docker load"
    elif not facts.probed and not missing:
        yield _unprobed(subject, facts)
    yield from facts.found


def _unprobed(subject: Subject, facts: Facts) -> str:
    """Why the checking container said nothing."""
    if facts.code < 0:
        return f"the image's container did not end within {SECONDS:.0f} s"
    said = _last(facts.errors)
    if "could not select device driver" in facts.errors or "unresolvable CDI" in facts.errors:
        return f"docker gives no GPUs ({said}); install the NVIDIA Container Toolkit there"
    if "No module named" in facts.errors or "executable file not found" in facts.errors:
        return f"{subject.image} is no image of this engine ({said}): docker build -f docker/Dockerfile -t {subject.image} ."
    return f"a container does not start: {said}"


def _last(errors: str) -> str:
    words = [line.strip() for line in errors.splitlines() if line.strip() and "--help" not in line]
    return words[-1] if words else "it said nothing"


def _clocks(subjects: Sequence[Subject], facts: Sequence[Facts]) -> list[list[str]]:
    """Whose clock differs for certain. Our own counts as one, or of two nobody could be said to be wrong."""
    known = [found.offset for found in facts if found.offset is not None]
    usual = statistics.median([0.0, *(sum(bounds) / 2 for bounds in known)])
    return [list(_clock(found, usual)) for found in facts]


def _clock(facts: Facts, usual: float) -> Iterator[str]:
    if facts.offset is None:
        return
    low, high = facts.offset[0] - usual, facts.offset[1] - usual
    if low > CLOCK_SECONDS or high < -CLOCK_SECONDS:
        way = "ahead of" if low > 0 else "behind"
        yield f"its clock is {min(abs(low), abs(high)):,.1f} s {way} the others'; set it by NTP (timedatectl set-ntp true)"


def _images(subjects: Sequence[Subject], facts: Sequence[Facts]) -> list[list[str]]:
    """Who has another image under the name than most; than the first, where there is no majority."""
    known = [found.image for found in facts if found.image not in ("", "none")]
    counts = Counter(known).most_common(2)
    usual = known[0] if len(counts) == 2 and counts[0][1] == counts[1][1] else (counts[0][0] if counts else "")
    differs = (
        f"{subjects[0].image} is another image than on the others; load the same on all (docker save, docker load)"
    )
    return [[differs] if found.image not in ("", "none", usual) else [] for found in facts]


def _unreached(subjects: Sequence[Subject], facts: Sequence[Facts]) -> list[list[str]]:
    """Whom node rank 0 did not meet, where it could have; it is node rank 0's fault where it met nobody."""
    if not facts[0].probed or facts[0].found:
        return [[] for _ in subjects]
    asked = [found for found in facts[1:] if found.probed]
    if len(asked) > 1 and all(found.unreached for found in asked):
        return [[f"no other host reaches it: {asked[0].unreached}"], *([] for _ in facts[1:])]
    return [[found.unreached] if found.unreached else [] for found in facts]
