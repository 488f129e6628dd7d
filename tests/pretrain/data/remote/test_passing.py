"""Chunks that cannot be had are passed over where the configuration says so: their samples count nothing, by name, on every
rank, and in every run that goes on from there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.stream import Stream
from pretrain.errors import UserError
from tests.pretrain import running
from tests.pretrain.data.remote.conftest import NewAccess, NewServer
from tests.pretrain.data.remote.servers import Fault
from tests.pretrain.data.remote.test_reading import NUMBERS, expected

PASS = "data.remote.on_missing=pass"


def without(source: Path, chunk: int) -> Fault:
    """A server's fault: one chunk of the source is never given."""
    stream = Stream([source], 16, seed=1)
    chunks = stream._chunks[0]
    shard, index = chunks._place(chunk)
    place = f"/{source.name}/{stream.manifests[0].shards[shard].name}", index * chunks._stride
    return lambda request, before: "404" if (request.path, request.start) == place else ""


def test_its_samples_are_ends_of_documents_and_all_others_are_as_they_were(
    source: Path, serve: NewServer, new_access: NewAccess
) -> None:
    server = serve(source.parent, without(source, 1))
    local = Stream([source], 16, seed=1)
    lost = local.order.locate(NUMBERS)[1] // local._per_chunk[0] == 1
    folder = new_access(on_missing="pass").folder(f"{server.url}/source")
    stream = Stream([folder], 16, seed=1, passes=True)
    tokens, whole = stream.read(NUMBERS), expected(source)
    assert 0 < lost.sum() < len(NUMBERS) and list(stream.passed) == [(0, 1)]
    assert (tokens[lost] == stream.eos).all() and np.array_equal(tokens[~lost], whole[~lost])
    assert len(server.asked_for(r"\.tar")) <= len(local._chunks[0].manifest.shards) * 9, "it is not asked for again"
    with pytest.raises(UserError, match=r"chunk 1: "):
        Stream([folder], 16, seed=1).read(NUMBERS)
    again = Stream([source], 16, seed=1)
    again.passed[0, 1] = ""  # as a checkpoint has it, though the chunk is here
    assert np.array_equal(again.read(NUMBERS), tokens)


@pytest.fixture
def far(tiny_data: Path, tmp_path: Path, serve: NewServer) -> tuple[Any, list[str]]:
    """The address of the tiny data, of which a chunk of step 6 is missing and none of the steps before, and options."""
    local = Stream([tiny_data / "train"], 32, seed=1)
    sizes = itertools.accumulate([0, *[6] * 6, *[8] * 6])
    firsts = list(sizes)
    chunks = [
        local.order.locate(np.arange(one, end))[1] // local._per_chunk[0] for one, end in itertools.pairwise(firsts)
    ]
    before = set(np.concatenate(chunks[:5]).tolist())
    missing = next(int(chunk) for later in chunks[5:] for chunk in later if int(chunk) not in before)
    server = serve(tiny_data, without(tiny_data / "train", missing))
    cache = [f"data.cache.dir={tmp_path / 'cache'}", "data.cache.size=8 MB", "data.remote.backoff_seconds=0.01"]
    return server.url, cache


def numbers(run: Path) -> list[dict[str, Any]]:
    keys = ("step", "samples", "loss", "batch_hash", "passed_samples", "validation_loss")
    lines = [{key: line[key] for key in keys if key in line} for line in running.lines_of(run)]
    return [line for line in lines if len(line) > 1]


def test_a_run_passes_over_it_by_name_and_so_does_one_that_goes_on(
    far: tuple[Any, list[str]], tiny_data: Path, tmp_path: Path
) -> None:
    url, options = far
    refused = running.train(tmp_path / "stops", url, *options)
    running.assert_refused(refused, "/train/shard-0000", "chunk ", "404")
    whole = running.train(tmp_path / "whole", url, *options, PASS)
    assert whole.code == 0 and whole.out.count("passed over: ") == 1, whole.told
    lines = numbers(tmp_path / "whole" / "run")
    passed = [line["passed_samples"] for line in lines if "passed_samples" in line]
    assert passed and passed == sorted(passed) and passed[-1] > 0
    [event] = [line for line in running.lines_of(tmp_path / "whole" / "run") if line.get("event") == "pass"]
    assert event["source"] == 0 and f"chunk {event['chunk']}" in event["why"] and url in event["why"]
    stopped = running.train(tmp_path / "again", url, *options, PASS, f"run.stop_at={event['step'] / 12:.6f} of total")
    assert stopped.code == 0, stopped.told
    step = running.steps_of(tmp_path / "again" / "run")[-1]
    state = running.manifest_of(tmp_path / "again" / "run", step)["state"]
    assert state["passed"] == [[0, event["chunk"]]], "it is in the checkpoint"
    gone_on = running.train(tmp_path / "again", tiny_data, PASS)  # where it is there again
    assert gone_on.code == 0 and "passed over" not in gone_on.out, gone_on.told
    assert numbers(tmp_path / "again" / "run") == lines


def test_all_ranks_know_of_what_one_cannot_have(far: tuple[Any, list[str]], tmp_path: Path) -> None:
    url, options = far
    alone = running.train(tmp_path / "alone", url, *options, PASS)
    layout = ("parallel.tensor=2", "batch.micro_size=1")
    ran = running.train(tmp_path / "four", url, *options, PASS, *layout, world=4)
    assert alone.code == ran.code == 0 and ran.out.count("passed over: ") == 1, ran.told
    for one, other in zip(numbers(tmp_path / "alone" / "run"), numbers(tmp_path / "four" / "run"), strict=True):
        assert {**one, "loss": 0, "validation_loss": 0} == {**other, "loss": 0, "validation_loss": 0}
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
