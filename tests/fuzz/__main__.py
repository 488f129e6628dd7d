"""`make fuzz`: changed files of every format to every reader, for a bounded time.

    python -m tests.fuzz [--seconds 60] [--only WORD] [--keep fuzz-failures] [--seed N]

Every outcome is the right data or a refusal. Anything else (another exception, a crash, a hang, memory, other tokens) is a
failure: its files, made as small as Hypothesis can, are kept in a folder of their own, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.subjects import Files, Subject, subjects
from tests.fuzz.worker import Worker

EXAMPLES = 100  # a round of one subject
FINE = ("right", "refused")


class Finding(Exception):
    """What a reader did that it must not do."""


class Fuzzer:
    """counts: of outcomes, by subject."""

    def __init__(self, made: dict[str, Subject], keep: Path | None) -> None:
        self.subjects, self.keep = made, keep
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in made}
        self.found: dict[str, str] = {}
        self._worker = Worker(made)

    def round(self, name: str, number: int, examples: int = EXAMPLES) -> None:
        """So many changes of a subject's files; number: another for other changes."""
        subject = self.subjects[name]
        last: list[Files] = []

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(st.data())
        def change_and_read(data: st.DataObject) -> None:
            files = dict(subject.files)
            for file, change in subject.changes.items():
                if len(subject.changes) == 1 or data.draw(st.booleans()):
                    files[file] = data.draw(change(files[file]))
            files = subject.mend(files)
            outcome = self._worker.run(name, files)
            self.counts[name][outcome if outcome in FINE else "wrong"] += 1
            if outcome not in FINE:
                last[:] = [files]
                raise Finding(outcome)

        try:
            change_and_read()
        except Finding as error:
            self.found[name] = f"{error}{self._kept(name, last[0])}"

    def _kept(self, name: str, files: Files) -> str:
        if self.keep is None:
            return ""
        mark = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]
        folder = self.keep / f"{name.replace(': ', '-')}-{mark}"
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        return f" (kept in {folder})"

    def close(self) -> None:
        self._worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long, over all subjects (default: 60)")
    parser.add_argument("--only", default="", help="subjects whose names hold this word")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that fail")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the changes (default: the clock)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = {name: subject for name, subject in subjects(Path(folder)).items() if args.only in name}
        fuzzer = Fuzzer(made, args.keep)
        end, number = time.monotonic() + args.seconds, args.seed
        print(f"{len(made)} subjects, {args.seconds:.0f} seconds, seed {args.seed}", flush=True)
        while time.monotonic() < end:
            for name in made:
                if time.monotonic() < end and name not in fuzzer.found:
                    fuzzer.round(name, number)
            number += 1
        fuzzer.close()
    for name, counts in fuzzer.counts.items():
        print(f"{name:32} right {counts['right']:6}  refused {counts['refused']:6}  wrong {counts['wrong']}")
    for name, words in fuzzer.found.items():
        print(f"FAILED {name}: {words}")
    print(f"{sum(map(Counter.total, fuzzer.counts.values())):,} changed files, {len(fuzzer.found)} failures")
    return bool(fuzzer.found)


if __name__ == "__main__":
    sys.exit(main())
