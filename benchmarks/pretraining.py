"""From scratch on a text: what a BERT, a GPT and an encoder-decoder of like size learn of it within some CPU minutes.

    python benchmarks/pretraining.py [--text FILE ...] [--steps 1500] [--models bert gpt encoder-decoder]

Without --text it is the standard library's sources. All three read the same shards, one document in ten held out. The BERT
is scored by how many hidden tokens it finds, beside always the commonest one; GPT and encoder-decoder by bits a byte of the
same held-out tokens: the second half of every sequence, of which the encoder has read the first half and the GPT all that
comes before. The unigram's bits a byte stand beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, about

sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.config.load import load_config
from pretrain.data.stream import Stream
from pretrain.loading import load_model
from pretrain.models.gpt import GPT
from pretrain.objectives.choice import objective_of
from pretrain.vocabulary import vocabulary_of

LENGTH = 128
MODELS = {
    "bert": (
        "model: {{kind: bert, num_layers: 4, {shape}, norm_position: pre}}",
        "objective: {kind: masked, pairs: none}",
    ),
    "gpt": ("model: {{kind: gpt, num_layers: 4, {shape}, positions: rope}}", "objective: {kind: causal}"),
    "encoder-decoder": (
        "model: {{kind: encoder-decoder, num_layers: 2, {shape}, positions: rope, norm_position: pre}}",
        "objective: {kind: prefix, prefix_share: 0.5}",
    ),
}
CONFIG = """
version: 1
{model}
{objective}
data: {{train: {shards}/train, validation: {shards}/validation, seq_length: {length}}}
batch: {{size: 32, micro_size: 32}}
optimizer: {{kind: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.98], weight_decay: 0.1, clip_norm: 1.0}}
schedule: {{kind: linear, warmup: {warmup} steps, total: {steps} steps, final_fraction: 0.0}}
checkpoint: {{every: {steps} steps, keep_last: 1}}
monitor: {{log_every: 50 steps, validate_every: {steps} steps, tensorboard: false}}
run: {{dir: "{run}", seed: {seed}}}
"""


def train(kind: str, folder: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """The run's folder, and the CPU seconds that it took, all of the command's."""
    model, objective = MODELS[kind]
    run, config = folder / kind, folder / f"{kind}.yaml"
    config.write_text(
        CONFIG.format(
            model=model.format(shape=f"hidden_size: {args.hidden_size}, num_heads: 4, dropout: 0.0"),
            objective=objective,
            shards=folder / "shards",
            length=LENGTH,
            warmup=args.steps // 10,
            steps=args.steps,
            run=run,
            seed=args.seed,
        )
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "pretrain", "train", str(config)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return run, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def held_out_of(run: Path) -> tuple[Stream, np.ndarray]:
    """The held-out samples in their order, and how often each token is in the text that was trained on, plus one."""
    data = load_config(run / "config.yaml", []).data
    streams = [Stream([Path(str(part))], LENGTH, 1, shuffle=False) for part in (data.train, data.validation)]
    counts = np.ones(streams[0].vocab_size)
    for first in range(0, streams[0].samples_per_epoch, 1024):
        numbers = np.arange(first, min(first + 1024, streams[0].samples_per_epoch))
        counts += np.bincount(streams[0].read(numbers)[:, :-1].ravel(), minlength=len(counts))
    return streams[1], counts


def batches_of(stream: Stream) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numbers (B,), and tokens (B, S + 1), of the stream's whole epoch."""
    numbers = np.array_split(np.arange(stream.samples_per_epoch), -(-stream.samples_per_epoch // 64))
    return [(some, stream.read(some)) for some in numbers]


@torch.inference_mode()
def masked_scores(run: Path) -> dict[str, float]:
    """The share of hidden tokens that the model finds, and that the commonest one of them is."""
    loaded, (stream, counts) = load_model(run), held_out_of(run)
    vocabulary = vocabulary_of(loaded.config, loaded.tokenizer)
    objective = objective_of(loaded.config, loaded.tokenizer, vocabulary, lanes=1)
    right, common, total = 0.0, 0.0, 0.0
    for numbers, tokens in batches_of(stream):
        batch = objective(torch.from_numpy(numbers), torch.from_numpy(tokens))
        right += loaded.model(*batch)[1].item()
        common += ((batch.targets == int(counts.argmax())) * batch.mask).sum().item()
        total += batch.mask.sum().item()
    return {"accuracy": right / total, "unigram_accuracy": common / total, "targets": total}


@torch.inference_mode()
def text_scores(run: Path) -> dict[str, float]:
    """Bits a byte of the second halves of the held-out sequences, and the unigram's."""
    loaded, (stream, counts) = load_model(run), held_out_of(run)
    vocabulary = vocabulary_of(loaded.config, loaded.tokenizer)
    unigram = -np.log(counts / counts.sum())
    half, nats, common, total = LENGTH // 2, 0.0, 0.0, 0
    for numbers, tokens in batches_of(stream):
        ids = torch.from_numpy(tokens)
        if isinstance(loaded.model, GPT):
            logits = loaded.model.logits(ids[:, : LENGTH - 1])[:, half - 1 :]
            nats += F.cross_entropy(logits.flatten(0, 1), ids[:, half:LENGTH].flatten(), reduction="sum").item()
        else:
            objective = objective_of(loaded.config, loaded.tokenizer, vocabulary, lanes=1)
            nats += loaded.model(*objective(torch.from_numpy(numbers), ids))[0].item()
        common += unigram[tokens[:, half:LENGTH]].sum()
        total += len(tokens) * half
    manifest = stream.manifests[0]
    bits = manifest.tokens / manifest.text_bytes / math.log(2) / total
    return {"bits_per_byte": nats * bits, "unigram_bits_per_byte": common * bits, "targets": total}


def parameters(run: Path) -> int:
    return sum(weight.numel() for weight in load_model(run).model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", help="files or folders of text (default: the standard library's sources)")
    parser.add_argument("--split", choices=("file", "blank-line"), default="file", help="what a document is")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=1500, help=f"of 32 sequences of {LENGTH} tokens (default: 1500)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for shards and runs, which stay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        sizes = ["--out", str(folder / "shards"), "--vocab-size", str(args.vocab_size), "--validation", "0.1"]
        text = [*args.text, "--split", args.split] if args.text else ["--stdlib"]
        command = [sys.executable, "-m", "pretrain", "prepare", *text, *sizes]
        if not (folder / "shards").exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results: dict[str, Any] = {}
        for kind in args.models:
            run, seconds = train(kind, folder, args)
            scores = masked_scores(run) if kind == "bert" else text_scores(run)
            results[kind] = {**scores, "cpu_seconds": seconds, "parameters": parameters(run)}
            print(kind, json.dumps(results[kind]), flush=True)
    if args.json:
        facts = about("pretraining", ("torch",), torch.get_num_threads(), "all held-out sequences, after training")
        tokens = args.steps * 32 * LENGTH
        args.json.write_text(json.dumps({**facts, "tokens": tokens, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
