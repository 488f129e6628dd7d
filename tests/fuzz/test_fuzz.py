"""A short run of the fuzzer, always the same; `make fuzz` goes on for as long as it is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tests.fuzz.__main__ import Fuzzer
from tests.fuzz.subjects import Read, Subject, subjects
from tests.fuzz.worker import Worker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return subjects(tmp_path_factory.mktemp("subjects"))


@pytest.fixture
def worker(made: dict[str, Subject]) -> Iterator[Worker]:
    worker = Worker({**made, **BAD})
    yield worker
    worker.close()


def test_changed_files_give_the_right_data_or_a_refusal(made: dict[str, Subject]) -> None:
    fuzzer = Fuzzer(made, None)
    for name in made:
        fuzzer.round(name, 1, 12)
    fuzzer.close()
    assert fuzzer.found == {}
    assert all(counts.total() >= 12 for counts in fuzzer.counts.values())


def test_files_as_they_are_give_the_right_data(made: dict[str, Subject], worker: Worker) -> None:
    outcomes = {name: worker.run(name, subject.mend(dict(subject.files))) for name, subject in made.items()}
    assert {name for name, outcome in outcomes.items() if outcome != "right"} == {
        name
        for name in made
        if name.startswith("tars")  # which hold a picture and a pickle
    }
    assert set(outcomes.values()) == {"right", "refused"}


def _raise(error: BaseException) -> Read:
    raise error


def _of(read: object) -> Subject:
    return Subject({"a": b"a"}, {}, read, lambda files, found: _judge(found))  # type: ignore[arg-type]


def _judge(found: Read) -> None:
    assert found.values == ["right"], "other data"


def _endless(_: Path) -> Read:
    while True:
        pass


BAD = {
    "other data": _of(lambda folder: Read(["wrong"], {})),
    "an exception": _of(lambda folder: _raise(KeyError("x"))),
    "a message of nothing": _of(lambda folder: _raise(UserError(""))),
    "a crash": _of(lambda folder: os.kill(os.getpid(), signal.SIGKILL)),
    "memory": _of(lambda folder: Read([len(b"x" * (600 << 20)) and "right"], {})),
    "a hang": _of(_endless),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_reader_must_not_do_is_found(worker: Worker, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.worker.SECONDS", 1)
    outcome = worker.run(what, {"a": b"a"})
    assert outcome not in ("right", "refused")
    fine = replace(BAD[what], read=lambda folder: Read(["right"], {}))
    worker._subjects["fine"] = fine
    worker.close()
    assert worker.run("fine", {"a": b"a"}) == "right"  # after one that died too


def test_a_failure_is_kept_as_small_as_it_gets(tmp_path: Path) -> None:
    from tests.fuzz.mutations import changed

    subject = Subject(
        {"a": bytes(1000)},
        {"a": changed},
        lambda folder: Read(["right" if len((folder / "a").read_bytes()) > 500 else "wrong"], {}),
        lambda files, found: _judge(found),
    )
    fuzzer = Fuzzer({"s": subject}, tmp_path)
    fuzzer.round("s", 1, 300)
    fuzzer.close()
    [folder] = tmp_path.iterdir()
    assert "other data" in fuzzer.found["s"] and str(folder) in fuzzer.found["s"]
    assert len((folder / "a").read_bytes()) <= 500
