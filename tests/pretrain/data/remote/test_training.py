"""The command `train` over shards at an address: the same run as over the folder, and as it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_python
from tests.pretrain.data.remote.conftest import NewServer
from tests.pretrain.data.remote.servers import tries
from tests.training import write_config

COMPARED = ("step", "samples", "loss", "grad_norm", "batch_hash", "validation_loss")


def trained(folder: Path, shards: Any, *overrides: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    """What the run logged, and what it told."""
    folder.mkdir(exist_ok=True)
    config = write_config(folder, shards)
    steps = [
        "schedule.total=3 steps",
        "schedule.warmup=1 steps",
        "monitor.validation_samples=8",
        "checkpoint.every=2 steps",
    ]
    result = run_python(["pretrain", "train", str(config), *steps, *overrides])
    assert result.returncode == code, result.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in COMPARED if name in line} for line in lines], result.stdout + result.stderr


def test_a_run_over_http_is_the_run_over_the_folder_and_goes_on_from_either(
    tiny_data: Path, tmp_path: Path, serve: NewServer
) -> None:
    server = serve(tiny_data, tries(1, "500"))
    cache = [f"data.cache.dir={tmp_path / 'cache'}", "data.cache.size=8 MB", "data.remote.backoff_seconds=0.01"]
    local, _ = trained(tmp_path / "local", tiny_data)
    remote, _ = trained(tmp_path / "remote", server.url, *cache, "run.stop_at=0.5 of total")
    assert len(remote) < len(local)
    remote, _ = trained(tmp_path / "remote", tiny_data)  # it is known by its hashes, wherever it lies
    assert remote == local and sum("validation_loss" in line for line in local) >= 1
    assert server.asked_for(r"train/.*\.tar") and server.asked_for(r"validation/.*\.tar")


@pytest.mark.slow
def test_a_run_whose_shard_is_gone_ends_with_its_name_and_code_2(
    tiny_data: Path, tmp_path: Path, serve: NewServer
) -> None:
    server = serve(tiny_data, tries(99, "500", r"train/.*\.tar"))
    cache = [f"data.cache.dir={tmp_path / 'cache'}", "data.remote.backoff_seconds=0.01", "data.remote.retries=1"]
    _, told = trained(tmp_path / "run", server.url, *cache, code=2)
    assert f"{server.url}/train/shard-00000.tar, chunk " in told and "HTTP 500 (2 tries, " in told
    assert "is the first to need it" in told and "Traceback" not in told
