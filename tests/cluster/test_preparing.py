"""`python -m launch slurm DIR --tasks N` on a real Slurm: the folder is that of one process, and a task that fails stops it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pretrain.data.prepare import plan_only
from pretrain.data.preparing.options import Options
from tests.cluster.slurm import Cluster
from tests.distributed import REPOSITORY
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts, write_texts

OPTIONS = {"vocab_size": 420, "max_train_bytes": 20_000, "validation": 0.2}


def test_an_array_prepares_a_folder_and_goes_on_after_a_task_that_failed(slurm: Cluster, tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "texts", stdlib_texts(12)), tmp_path / "shards"
    plan_only([texts], out, Options(piece_bytes=9000, **OPTIONS), processes=1, say=lambda _: None)  # type: ignore[arg-type]
    draft = tmp_path / ".shards.preparing"

    def submit() -> None:
        words = ["-m", "launch", "slurm", str(out), "--tasks", "3", "--time", "5", "--cpus", "1"]
        environment = {**os.environ, **slurm.environment, "PYTHONPATH": str(REPOSITORY)}
        result = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the end of all jobs", 120)

    shutil.move(texts / "0000.txt", tmp_path / "away.txt")
    submit()
    logs = "".join(path.read_text() for path in (draft / "logs").glob("encode-*.out"))
    assert "0000.txt is gone since the work began" in logs and not out.exists()
    assert not list((draft / "logs").glob("merge-*.out")), "no merge without its array"
    shutil.move(tmp_path / "away.txt", texts / "0000.txt")
    submit()
    quietly([texts], tmp_path / "direct", **OPTIONS)
    found = {name: digest for name, digest in hashes(out).items() if name.split("/")[0] not in ("launch", "logs")}
    assert found == hashes(tmp_path / "direct"), list((out / "logs").iterdir())
