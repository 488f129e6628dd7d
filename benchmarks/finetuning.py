"""Fine-tuning against transformers' own Trainer: the same model, files, hyperparameters and steps, seed by seed in turn.

    python benchmarks/finetuning.py classification --initial MODEL --train train.tsv --validation dev.tsv --seeds 3

Ours runs as a user runs it (`python -m pretrain train configs/finetune/TASK.yaml ...`), with data, logging and checkpoint;
the Trainer groups by length too, and neither validates in between. Both predictions are scored by the same code. Rates are
of training alone, as each reports them. Needs accelerate, which the Trainer needs: pip install --no-deps accelerate
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, about

sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch

from pretrain.config.load import load_config
from pretrain.config.run import Config
from pretrain.finetuning.judging import predicted
from pretrain.finetuning.opening import open_examples
from pretrain.finetuning.tasks import Sample, Task
from pretrain.inherit import initial_tokenizer, with_initial
from pretrain.schedule import Plan
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.trials import mean, standard_deviation
from pretrain.vocabulary import vocabulary_of

CLASSES = {
    "classification": "BertForSequenceClassification",
    "tagging": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
}


def ours(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "pretrain", "train", *_source(args, seed), f"run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
    last = [line for line in lines if "validation_loss" in line][-1]
    scores = {name.removeprefix("validation_"): last[name] for name in last if name.startswith("validation_")}
    return {**scores, "examples_per_second": float(np.median(rates))}


def _source(args: argparse.Namespace, seed: int) -> list[str]:
    fields = {
        "model.initial": args.initial,
        "data.train": args.train,
        "data.validation": args.validation,
        "run.seed": seed,
    }
    never = ["monitor.validate_every=1000000 steps", "checkpoint.every=1000000 steps", "monitor.tensorboard=false"]
    overrides = [f"{name}={value}" for name, value in fields.items()]
    return [f"configs/finetune/{args.task}.yaml", *overrides, *never, *args.overrides]


def features(sample: Sample, task: Task) -> dict[str, Any]:
    """A sample as the Trainer takes it."""
    row = sample.rows[0]
    made: dict[str, Any] = {
        "input_ids": row.ids.tolist(),
        "token_type_ids": row.segments.tolist(),
        "attention_mask": [1] * len(row.ids),
    }
    if task.config.kind == "question-answering":
        return {**made, "start_positions": int(sample.targets[0]), "end_positions": int(sample.targets[1])}
    targets = sample.targets.tolist()
    return {**made, "labels": targets[0] if task.config.kind == "classification" else targets}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest."""
    width, made = max(len(row["input_ids"]) for row in rows), {}
    for name in rows[0]:
        filler = IGNORED if name == "labels" else 0
        values = [
            row[name] + [filler] * (width - len(row[name])) if isinstance(row[name], list) else row[name]
            for row in rows
        ]
        made[name] = torch.tensor(values)
    return made


def theirs(config: Config, task: Task, train: list[Sample], held_out: Any, seed: int, folder: Path) -> dict[str, float]:
    import transformers

    transformers.set_seed(seed)
    plan = Plan(config, len(train))
    labels = {} if task.config.kind == "question-answering" else {"num_labels": task.num_outputs}
    model = getattr(transformers, CLASSES[task.config.kind]).from_pretrained(config.model.initial, **labels)
    optimizer = config.optimizer
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.total_steps,
        warmup_steps=plan.steps(config.schedule.warmup),
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        lr_scheduler_type="linear",
        per_device_train_batch_size=config.batch.size,
        per_device_eval_batch_size=config.batch.size,
        group_by_length=True,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        disable_tqdm=True,
    )
    rows = [features(sample, task) for sample in train]
    trainer = transformers.Trainer(model, settings, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    spent = trainer.train().metrics["train_runtime"]
    outputs = {}
    model.eval()
    with torch.inference_mode():
        for place, sample in enumerate(held_out.samples):
            row = collate([features(sample, task)])
            found = model(**{name: row[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
            answers = task.config.kind == "question-answering"
            scores = torch.stack((found.start_logits, found.end_logits), -1) if answers else found.logits
            outputs[place] = scores[0].reshape(-1, task.num_outputs).numpy()
    lines = list(predicted(task, held_out.items, held_out.samples, outputs))
    return {**task.metrics(held_out.items, lines), "examples_per_second": plan.samples_before(plan.total_steps) / spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(CLASSES))
    parser.add_argument("--initial", required=True, help="folder of a BERT of Hugging Face's")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of both")
    args = parser.parse_intermixed_args()
    results: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(1, args.seeds + 1):
            path, *overrides = _source(args, seed)
            config = with_initial(load_config(path, overrides))
            tokenizer = initial_tokenizer(args.initial)
            task, train, held_out = open_examples(config, tokenizer, vocabulary_of(config, tokenizer))
            results["ours"].append(ours(args, seed, Path(name) / f"ours-{seed}"))
            results["transformers"].append(
                theirs(config, task, train.samples, held_out, seed, Path(name) / f"theirs-{seed}")
            )
            print(json.dumps({side: found[-1] for side, found in results.items()}), flush=True)
    assert task.metric is not None
    for side, found in results.items():
        for metric in (task.metric, "examples_per_second"):
            values = [one[metric] for one in found]
            spread = standard_deviation(values)
            print(f"{side}: {metric} {mean(values):.4f}" + ("" if spread is None else f" (sd {spread:.4f})"))
    rates = [mean([one["examples_per_second"] for one in results[side]]) for side in ("ours", "transformers")]
    print(f"ours trains at {rates[0] / rates[1]:.2f} times the Trainer's rate")
    if args.json:
        facts = about("finetuning", ("torch", "transformers"), torch.get_num_threads(), "each seed: ours, then theirs")
        args.json.write_text(json.dumps({**facts, "task": args.task, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
