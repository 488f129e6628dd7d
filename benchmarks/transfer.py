"""Whether pre-training helps: a BERT of our own tuned to a classifier, against the same model from random weights.

    python benchmarks/transfer.py --initial RUN --train train.tsv --validation dev.tsv [--seeds 5]

RUN is a BERT pre-trained here (`benchmarks/pretraining.py --models bert --keep FOLDER` makes FOLDER/bert). Seed by seed both
are trained with the same config, order and steps; the difference of their scores is told with its 95% confidence interval
(Student's t over the seeds).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, about

sys.path.insert(0, str(REPOSITORY))

import torch

from pretrain.tasks.trials import mean, standard_deviation

STARTS: dict[str, int | str] = {"pre-trained": 0, "random": "all"}  # model.reset
# Student's t, two-sided 95%, by degrees of freedom
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def accuracy(args: argparse.Namespace, seed: int, reset: int | str, run: Path) -> dict[str, float]:
    """Of the last validation, and what is reached without learning."""
    fields = {
        "model.initial": args.initial,
        "model.reset": reset,
        "data.train": args.train,
        "data.validation": args.validation,
        "run.seed": seed,
        "run.dir": run,
    }
    settings = [f"{name}={value}" for name, value in fields.items()] + ["monitor.tensorboard=false"]
    command = [sys.executable, "-m", "pretrain", "train", "configs/finetune/classification.yaml", *settings]
    subprocess.run([*command, *args.overrides], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_accuracy" in line][-1]
    return {name.removeprefix("validation_"): last[name] for name in last if name.startswith("validation_")}


def interval(values: list[float]) -> tuple[float, float]:
    """95% confidence interval of the mean of two to eleven values."""
    half = T95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", required=True, metavar="RUN")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 12), metavar="2..11")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of both")
    args = parser.parse_intermixed_args()
    scores: dict[str, list[float]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            for name, reset in STARTS.items():
                found = accuracy(args, seed, reset, Path(folder) / f"{name}-{seed}")
                scores[name].append(found["accuracy"])
            print(f"seed {seed}: " + ", ".join(f"{name} {held[-1]:.4f}" for name, held in scores.items()), flush=True)
    for name, held in scores.items():
        print(f"{name}: accuracy {mean(held):.4f} (sd {standard_deviation(held):.4f})")
    gains = [one - other for one, other in zip(*scores.values(), strict=True)]
    low, high = interval(gains)
    print(f"pre-training gives {mean(gains):+.4f} (95% confidence {low:+.4f} to {high:+.4f})")
    if args.json:
        result: dict[str, Any] = {"scores": scores, "gain": mean(gains), "confidence_95": [low, high]}
        facts = about("transfer", ("torch",), torch.get_num_threads(), "each seed: pre-trained, then random")
        args.json.write_text(json.dumps({**facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
