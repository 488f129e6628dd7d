"""Training speed of the whole engine on one CPU process, against a plain PyTorch loop of the same model.

    python benchmarks/training.py [--model gpt|bert|encoder-decoder] [--rounds 6] [--steps 8] [--json FILE]

Three processes: the engine, with its stream of hashed shards, DeepSpeed's ZeRO, metrics and TensorBoard (everything
but validation and checkpoints, which the plain loop has not); and a plain loop, once in fp32 without compilation, once
compiled. The plain loop's GPT is nanoGPT's (benchmarks/plain.py); its BERT-mini (masked tokens and sentence pairs, 32 x
128) and its encoder-decoder (the 2017 base, 4 x 128 tokens read and 128 predicted) are transformers' own modules
(benchmarks/theirs.py). All stay alive and are told in turn to run some steps, so that nothing else runs meanwhile
and slow phases of the machine meet all alike. What is claimed is the median over the rounds of the ratio within a
round; the range is told beside it.

The engine and the compiled loop compute in bf16 where the CPU has instructions for it, and in fp32 where bf16 would be
emulated (5 to 30 times slower).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, SHARDS, about, no_shards, ratios

VARIANTS = ("engine", "eager", "compiled")


def main() -> int:
    args = _options().parse_args()
    if args.worker:
        return _work(args)
    if no_shards(args.shards):
        return 2
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        args.folder = Path(folder)
        result = _measure(args)
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=("gpt", "bert", "encoder-decoder"), default="gpt", help="(default: gpt)")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each (default: 6)")
    parser.add_argument("--steps", type=int, default=8, help="steps a measurement (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default: 2)")
    parser.add_argument("--compute", choices=("auto", "bf16", "fp32"), default="auto", help="(default: auto)")
    parser.add_argument("--shards", type=Path, default=SHARDS, help="prepared text with 8192 tokens (default: shards)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the engine")
    for hidden, kind in (("--worker", str), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser


# -- the parent ------------------------------------------------------------------------------------------------------


class Worker:
    """One variant in a process of its own, which waits unless it is told to run."""

    def __init__(self, variant: str, args: argparse.Namespace) -> None:
        self.variant = variant
        self.log = args.folder / f"{variant}.log"
        options = [
            f"--worker={variant}",
            f"--folder={args.folder}",
            f"--shards={args.shards}",
            f"--compute={args.compute}",
            f"--model={args.model}",
        ]
        command = [sys.executable, __file__, *options, *args.overrides]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(args.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHINDUCTOR_CACHE_DIR": str(args.folder / f"inductor-{variant}"),
            "PYTHONPATH": str(REPOSITORY),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def run(self, steps: int) -> dict[str, Any]:
        """Run steps; {seconds, tokens, loss, compute} of them."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the {self.variant} process died:\n{self.log.read_text(errors='replace')[-4000:]}")
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    workers: list[Worker] = []
    try:
        for variant in VARIANTS:
            workers.append(Worker(variant, args))
            workers[-1].run(3)  # alone: compilation, first touches of memory
            print(f"{variant}: ready", file=sys.stderr, flush=True)
        rounds: list[dict[str, float]] = []
        last: dict[str, Any] = {}
        for turn in range(args.rounds):
            speeds = {}
            for worker in workers[turn % 3 :] + workers[: turn % 3]:
                last[worker.variant] = answer = worker.run(args.steps)
                speeds[worker.variant] = answer["tokens"] / answer["seconds"]
            rounds.append(speeds)
            line = ", ".join(f"{variant} {speeds[variant]:,.0f}" for variant in VARIANTS)
            print(f"round {turn + 1} of {args.rounds}: {line} tokens/s", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    sampled = f"after 3 steps of each, {args.rounds} rounds of {args.steps} steps in turn"
    machine = {"model": args.model} | about(
        "training", ("torch", "deepspeed", "megatron-core", "numpy"), args.threads, sampled
    )
    found = ratios(rounds, "engine", VARIANTS[1:])
    return {"started": started, **machine, "last": last, "tokens_per_second": rounds, "ratios": found}


def _print(result: dict[str, Any]) -> None:
    compute = result["last"]["engine"]["compute"]
    names = {
        "engine": f"this engine, {compute}",
        "eager": "plain loop, fp32 eager",
        "compiled": f"plain loop, {compute} compiled",
    }
    print(f"{result['hardware']['cpu']}, {result['hardware']['threads']} threads, torch {result['versions']['torch']}")
    for variant in VARIANTS:
        speeds = [speeds[variant] for speeds in result["tokens_per_second"]]
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        loss = result["last"][variant]["loss"]
        print(f"{names[variant]:<30} {statistics.median(speeds):>7,.0f} tokens/s  ({spread}; last loss {loss:.2f})")
    for name, ratio in result["ratios"].items():
        print(f"{name:<30} {ratio['median']:>7.2f} x         ({ratio['min']:.2f} to {ratio['max']:.2f})")


# -- the processes that are measured ---------------------------------------------------------------------------------


def _work(args: argparse.Namespace) -> int:
    """Run steps as told on stdin, and tell the time on stdout; whatever else would print there goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(REPOSITORY))
    if args.worker == "engine":
        _engine(args, replies)
    else:
        _plain(args, replies, compiled=args.worker == "compiled")
    return 0


def _reply(replies: Any, started: float, tokens: int, loss: float, compute: str) -> None:
    answer = {"seconds": time.perf_counter() - started, "tokens": tokens, "loss": loss, "compute": compute}
    print(json.dumps(answer), file=replies, flush=True)


def _plain(args: argparse.Namespace, replies: Any, compiled: bool) -> None:
    import torch

    from pretrain.build import computes_in_bf16

    bf16 = compiled and (args.compute == "bf16" or (args.compute == "auto" and computes_in_bf16(torch.device("cpu"))))
    training, tokens = (_nano if args.model == "gpt" else _transformers)(args, bf16, compiled)
    loss = float("nan")
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            loss = new if (new := next(training)) is not None else loss
        _reply(replies, started, int(line) * tokens, loss, "bf16" if bf16 else "fp32")


def _nano(args: argparse.Namespace, bf16: bool, compiled: bool) -> tuple[Iterator[float | None], int]:
    """The loop, and the tokens of a step."""
    import numpy as np
    from plain import Shape, steps

    from pretrain.data.stream import Stream

    stream, shape = Stream([args.shards / "train"], Shape().tokens, seed=1), Shape()
    assert stream.vocab_size == shape.vocabulary, f"{args.shards}: {stream.vocab_size} tokens, not {shape.vocabulary}"
    file = args.folder / f"{args.worker}.bin"  # a million of the engine's own tokens
    rows = stream.read(np.arange(min(4096, stream.samples_per_epoch)))
    rows[:, :-1].astype(np.uint16).tofile(file)
    return steps(file, shape, bf16, compiled), shape.batch * shape.tokens


def _transformers(args: argparse.Namespace, bf16: bool, compiled: bool) -> tuple[Iterator[float | None], int]:
    """The loop, and the tokens of a step."""
    from theirs import steps

    from pretrain.runs import open_config

    path = args.folder / f"{args.worker}.yaml"
    path.write_text(_config(args))
    config = open_config(str(path), args.overrides, 1)
    return steps(config, bf16, compiled), config.batch.size * config.data.seq_length


def _engine(args: argparse.Namespace, replies: Any) -> None:
    import torch

    from parallel.grid import start_grid
    from parallel.layout import Layout
    from pretrain import train
    from pretrain.build import choose_precision
    from pretrain.data.sources import Sources
    from pretrain.interrupt import Interrupt
    from pretrain.report import Reporter
    from pretrain.runs import open_config
    from pretrain.session import facts_of
    from pretrain.step_data import StepData

    path = args.folder / "engine.yaml"
    path.write_text(_config(args))
    config = open_config(str(path), args.overrides, 1)
    sources = Sources.open(config)
    grid = start_grid(Layout.of(config.parallel, 1), 60)
    config = choose_precision(config, grid)

    class Paced(train.Run):
        """Stops between steps until it is told to go on."""

        loss = float("nan")

        def data(self) -> Iterator[StepData]:
            source = super().data()
            for line in sys.stdin:
                started = time.perf_counter()
                for _ in range(int(line)):
                    yield next(source)  # and, when it goes on here, the whole step
                tokens = int(line) * config.batch.size * config.data.seq_length
                _reply(replies, started, tokens, self.loss, config.precision.compute)

        def log(self, data: StepData, loss: Any, update: Any) -> None:
            super().log(data, loss, update)
            if self.due(config.monitor.log_every):
                self.loss = sum(loss.cpu() / torch.tensor(data.targets)).item()

    run = Paced(config, grid, sources, Interrupt())
    train.runs.claim_folder(config, grid, sources)
    with Reporter(config, grid, facts_of(run)) as run.reporter:
        run.resume()
        train.train(run)


MODELS = {
    "gpt": """
model: {num_layers: 6, hidden_size: 384, num_heads: 6, positions: learned, norm: layer, activation: gelu-tanh, biases: false}
data: {seq_length: 256}
batch: {size: 16, micro_size: 16}
""",
    "bert": """
model: {kind: bert, num_layers: 4, hidden_size: 256, num_heads: 4, norm_position: post, norm_epsilon: 1.0e-12, dropout: 0.1}
objective: {kind: masked, pairs: next}
data: {seq_length: 128}
batch: {size: 32, micro_size: 32}
""",
    "encoder-decoder": """
model: {kind: encoder-decoder, num_layers: 6, hidden_size: 512, num_heads: 8, ffn_hidden_size: 2048, activation: relu,
        positions: sinusoidal, norm_position: post, scale_embeddings: true, dropout: 0.1, attention_dropout: 0.0,
        initial_scale: 0.0442, scale_initial_by_depth: false}
objective: {kind: prefix, prefix_share: 0.5}
data: {seq_length: 256}
batch: {size: 4, micro_size: 4}
""",
}


def _config(args: argparse.Namespace) -> str:
    train = f"data: {{train: {json.dumps(str(args.shards / 'train'))}, "
    return f"""
version: 1
{MODELS[args.model].replace("data: {", train)}
optimizer: {{learning_rate: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}}
schedule: {{kind: constant, total: 100000 steps}}
precision: {{compute: {args.compute}}}
checkpoint: {{every: 100000 steps}}
run: {{dir: {json.dumps(str(args.folder / "run"))}}}
"""


if __name__ == "__main__":
    sys.exit(main())
