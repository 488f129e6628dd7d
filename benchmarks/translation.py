"""Sequence to sequence against transformers' Marian model: the same pairs, tokenizer, shape, hyperparameters and steps, in turn.

    python benchmarks/translation.py [--steps 1500] [--seeds 1]

The pairs are made of the standard library: what a function does, and its name. Ours runs as a user runs it (packed rows, the
real `train`, logging); Marian is trained by a plain loop on padded batches of as many pairs a step, with torch's fused AdamW.
Held-out pairs are written with 4 beams by each, and scored by the same code, beside copies of the sources.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import REPOSITORY, about

sys.path.insert(0, str(REPOSITORY))

import torch
import torch.nn.functional as F
from theirs import marian_model

from pretrain.config.load import load_config
from pretrain.config.run import Config
from pretrain.data.made import docstrings
from pretrain.data.pairs import Lengths, prepare_pairs
from pretrain.data.preparing.options import Options
from pretrain.data.stream import Stream
from pretrain.loading import load_model
from pretrain.models.transformer import EncoderDecoder
from pretrain.schedule import Plan
from pretrain.tokenization.base import Tokenizer
from pretrain.translation import Search, Written, pairs_in, scores_of, write_targets

LENGTHS = Lengths(160, 48)
CONFIG = """
version: 1
model: {kind: encoder-decoder, num_layers: 3, hidden_size: 192, num_heads: 4, ffn_hidden_size: 768, activation: relu,
        positions: sinusoidal, norm_position: post, scale_embeddings: true, dropout: 0.2, attention_dropout: 0.0,
        initial_scale: 0.0722, scale_initial_by_depth: false}
data: {train: SHARDS/train, validation: SHARDS/validation, seq_length: 208}
objective: {kind: sequence-to-sequence, source_length: 160, label_smoothing: 0.1}
batch: {size: 8, micro_size: 8}
optimizer: {learning_rate: 1.0e-3, betas: [0.9, 0.98], epsilon: 1.0e-9, weight_decay: 0.0, clip_norm: 1.0}
schedule: {kind: inverse-sqrt, warmup: 200 steps, total: STEPS steps}
precision: {compute: fp32}
monitor: {log_every: 50 steps, tensorboard: false}
"""


def ours(
    config_path: Path, run: Path, seed: int, held_out: Sequence[tuple[str, str]]
) -> tuple[dict[str, float], float]:
    """Scores, and the seconds that training took."""
    command = [sys.executable, "-m", "pretrain", "train", str(config_path), f"run.dir={run}", f"run.seed={seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    last = [line for line in lines if "tokens" in line][-1]
    loaded = load_model(run)
    assert isinstance(loaded.model, EncoderDecoder)
    written = list(write_targets(loaded.model, loaded.tokenizer, held_out, Search()))
    return scores_of(written), last["tokens"] * len(rates) / sum(rates)


def theirs(
    config: Config, pairs: list[tuple[str, str]], batch: int, held_out: Sequence[tuple[str, str]], tokenizer: Tokenizer
) -> tuple[dict[str, float], float]:
    torch.manual_seed(config.run.seed)
    model = marian_model(config, tokenizer.vocab_size, tokenizer.eos, tokenizer.special["pad"], max(LENGTHS))
    plan, optimizer = Plan(config, len(pairs)), config.optimizer
    adam = torch.optim.AdamW(
        model.parameters(), 1.0, optimizer.betas, optimizer.epsilon, optimizer.weight_decay, fused=True
    )
    ids = [(tokenizer.encode(one), tokenizer.encode(two)) for one, two in pairs]
    order: list[int] = []
    started = time.perf_counter()
    for step in range(plan.total_steps):
        if len(order) < batch:
            order = torch.randperm(len(ids)).tolist()
        chosen, order = order[:batch], order[batch:]
        loss = marian_loss(model, [ids[number] for number in chosen], tokenizer, config.objective.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
        for group in adam.param_groups:
            group["lr"] = plan.learning_rate(step)
        adam.step()
        adam.zero_grad()
    seconds = time.perf_counter() - started
    return scores_of(list(marian_writes(model.eval(), tokenizer, held_out))), seconds


def marian_loss(model: Any, pairs: list[tuple[list[int], list[int]]], tokenizer: Tokenizer, smoothing: float) -> Any:
    eos = tokenizer.eos
    source, known = padded([[*one, eos] for one, _ in pairs], tokenizer)
    read, _ = padded([[eos, *two] for _, two in pairs], tokenizer)
    wanted, counted = padded([[*two, eos] for _, two in pairs], tokenizer)
    logits = model(input_ids=source, attention_mask=known, decoder_input_ids=read, use_cache=False).logits
    return F.cross_entropy(logits.mT, torch.where(counted > 0, wanted, -100), label_smoothing=smoothing)


def padded(rows: list[list[int]], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids, and 1 where there is a token."""
    width, pad = max(map(len, rows)), tokenizer.special["pad"]
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


@torch.inference_mode()
def marian_writes(model: Any, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Any:
    for source, wanted in pairs:
        ids = torch.tensor([[*tokenizer.encode(source), tokenizer.eos]])
        options = {"num_beams": 4, "length_penalty": 0.6, "max_new_tokens": LENGTHS.target, "do_sample": False}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        special = (tokenizer.eos, tokenizer.special["pad"])
        yield Written(source, tokenizer.decode([token for token in found if token not in special]), 0.0, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.tsv").write_text("".join(f"{one}\t{two}\n" for one, two in docstrings()))
        options = Options(vocab_size=2000, validation=0.1)
        prepare_pairs([folder / "pairs.tsv"], folder / "shards", LENGTHS, options, say=lambda _: None)
        path = folder / "config.yaml"
        path.write_text(CONFIG.replace("SHARDS", str(folder / "shards")).replace("STEPS", str(args.steps)))
        streams = [
            Stream([folder / "shards" / part], sum(LENGTHS), 1, shuffle=False) for part in ("train", "validation")
        ]
        train, held_out = (list(pairs_in(stream, LENGTHS.source)) for stream in streams)
        tokenizer = streams[0].manifests[0].tokenizer()
        for seed in range(1, args.seeds + 1):
            config = load_config(path, [f"run.seed={seed}"])
            batch = round(len(train) / streams[0].samples_per_epoch * config.batch.size)
            mine, mine_seconds = ours(path, folder / f"run-{seed}", seed, held_out)
            other, other_seconds = theirs(config, train, batch, held_out, tokenizer)
            results.append({"ours": mine, "marian": other, "seconds": [mine_seconds, other_seconds]})
            print(f"seed {seed}: {len(train):,} pairs, {len(held_out)} held out, {batch} a step, {args.steps} steps")
            for side, found, seconds in (("ours", mine, mine_seconds), ("Marian", other, other_seconds)):
                print(
                    f"  {side}: BLEU {found['bleu']:.1f}, exact {found['exact_match']:.3f} (copying the source: BLEU "
                    f"{found['floor_bleu']:.1f}, exact {found['floor_exact_match']:.3f}), {seconds:.0f} s"
                )
            print(f"  ours trains at {other_seconds / mine_seconds:.2f} times Marian's rate", flush=True)
    if args.json:
        facts = about("translation", ("torch", "transformers"), torch.get_num_threads(), "each seed: ours, then Marian")
        args.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
