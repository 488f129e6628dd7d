"""What makes a host unfit for a run, from what its ranks have told of it; and the words for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CLOCKS_APART = 1.0  # seconds: beyond it times in logs mislead
SPOILING = ("clock", "memory", "disk")  # findings that a run may survive
GIBIBYTE = 2**30


class Seen(NamedTuple):
    """What a rank has, and what the run needs of it, in bytes."""

    rank: int
    host: str
    device: str
    gpu: str  # the one and only name of its GPU; empty of a CPU
    right: bool  # the device computes right
    broken: list[str]  # devices of its host
    needs: int  # memory of its device
    has: int
    needs_of_host: int
    host_has: int
    disk: int
    unwritable: str
    clock: float  # seconds ahead of the middle of all


class Finding(NamedTuple):
    """A host that is not fit, and why."""

    check: str
    host: str
    ranks: list[int]
    words: str


class Verdict(NamedTuple):
    seen: list[Seen]
    rates: dict[str, float]  # bytes a second of each kind of group, the slowest of its kind
    needs_disk: int
    findings: list[Finding]

    @property
    def exclude(self) -> list[str]:
        """Hosts to start without; none where all have findings, for then it is not the hosts."""
        unfit = sorted({finding.host for finding in self.findings})
        return unfit if set(unfit) != {one.host for one in self.seen} else []


def findings(seen: Sequence[Seen], needs_disk: int) -> list[Finding]:
    """Of all that ranks tell by themselves."""
    return [*_devices(seen), *_clocks(seen), *_memory(seen), *_disk(seen, needs_disk)]


def _devices(seen: Sequence[Seen]) -> Iterator[Finding]:
    for ranks in _hosts(seen).values():
        gpus = [one.gpu for one in ranks if one.gpu]
        if len(set(gpus)) < len(gpus):
            yield _finding("device", ranks, f"{len(gpus)} ranks share {len(set(gpus))} GPUs")
        wrong = [one for one in ranks if not one.right]
        if wrong:
            yield _finding("device", wrong, "a product of whole numbers comes out wrong on its device")
        broken = sorted({index for one in ranks for index in one.broken})
        if broken:
            yield _finding("device", ranks, f"errors in memory that were not mended, on GPU {', '.join(broken)}")
    kinds = [one.device for one in seen]
    usual = max(sorted(set(kinds)), key=kinds.count)
    for ranks in _hosts([one for one in seen if one.device != usual]).values():
        yield _finding("device", ranks, f"has {ranks[0].device}, the others {usual}")


def _clocks(seen: Sequence[Seen]) -> Iterator[Finding]:
    for ranks in _hosts(seen).values():
        off = min((one.clock for one in ranks), key=abs)
        if abs(off) > CLOCKS_APART:
            way = "ahead of" if off > 0 else "behind"
            yield _finding(
                "clock", ranks, f"its clock is {abs(off):.1f} s {way} the others'; let chrony or ntpd set it"
            )


def _memory(seen: Sequence[Seen]) -> Iterator[Finding]:
    for ranks in _hosts(seen).values():
        needs, has = sum(one.needs_of_host for one in ranks), min(one.host_has for one in ranks)
        if needs > has:
            words = f"{_size(has)} of its memory are free, {len(ranks)} ranks need {_size(needs)}"
            yield _finding("memory", ranks, words)
        for one in ranks:
            if one.gpu and one.needs > one.has:
                yield _finding("memory", [one], f"{_size(one.has)} of its GPU are free, it needs {_size(one.needs)}")


def _disk(seen: Sequence[Seen], needs: int) -> Iterator[Finding]:
    for ranks in _hosts(seen).values():
        if unwritable := next((one.unwritable for one in ranks if one.unwritable), ""):
            yield _finding("folder", ranks, f"run.dir: {unwritable}")
        elif min(one.disk for one in ranks) < needs:
            words = f"{_size(min(one.disk for one in ranks))} are free for run.dir, checkpoints need {_size(needs)}"
            yield _finding("disk", ranks, words)


def of_links(seen: Sequence[Seen], slow: dict[str, float], floor: float, ranks: Sequence[int]) -> Iterator[Finding]:
    named = ", ".join(f"{name} {rate / 1e6:.1f}" for name, rate in slow.items())
    for found in _hosts([one for one in seen if one.rank in ranks]).values():
        words = f"a slow link: all-reduces reach {named} MB/s, at least {floor / 1e6:g} are asked for"
        yield _finding("link", found, words)


def _hosts(seen: Sequence[Seen]) -> dict[str, list[Seen]]:
    hosts: dict[str, list[Seen]] = {}
    for one in seen:
        hosts.setdefault(one.host, []).append(one)
    return hosts


def _finding(check: str, ranks: Sequence[Seen], words: str) -> Finding:
    return Finding(check, ranks[0].host, [one.rank for one in ranks], words)


def _size(count: int) -> str:
    return f"{count / GIBIBYTE:.2f} GiB"


# -- telling ---------------------------------------------------------------------------------------------------------


def told(verdict: Verdict) -> str:
    """The findings, for a person who is to start the run again."""
    lines = [
        f"  {finding.host} (rank{'s' if len(finding.ranks) > 1 else ''} {', '.join(map(str, finding.ranks))}): {finding.words}"
        for finding in verdict.findings
    ]
    hosts = sorted({finding.host for finding in verdict.findings})
    title = f"{', '.join(hosts)} {'are' if len(hosts) > 1 else 'is'} not fit for this run:"
    mend = [f"Mend that, or start without: --exclude {','.join(verdict.exclude)}"] if verdict.exclude else []
    return "\n".join([title, *lines, *mend])


def summary(verdict: Verdict) -> list[str]:
    """What was seen, in a few lines."""
    seen = verdict.seen
    hosts = _hosts(seen)
    rates = ", ".join(f"{name} {rate / 1e6:,.0f} MB/s" for name, rate in verdict.rates.items())
    return [
        f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}, {len(seen)} rank{'s' if len(seen) > 1 else ''}, on "
        + ", ".join(sorted({one.device for one in seen})),
        f"clocks: at most {max(abs(one.clock) for one in seen):.3f} s from the middle one",
        f"memory: a rank needs up to {_size(max(one.needs for one in seen))}, free are {_size(min(one.has for one in seen))}",
        f"disk: checkpoints need {_size(verdict.needs_disk)}, free are {_size(min(one.disk for one in seen))}",
        *([f"all-reduce of a mebibyte: {rates}"] if rates else []),
    ]


def as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "ready": not verdict.findings,
        "ranks": [one._asdict() for one in verdict.seen],
        "bytes_per_second": verdict.rates,
        "checkpoint_bytes": verdict.needs_disk,
        "findings": [finding._asdict() for finding in verdict.findings],
        "exclude": verdict.exclude,
    }
