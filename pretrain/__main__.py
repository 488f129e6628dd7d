"""The command line: `python -m pretrain COMMAND ...`, or `pretrain COMMAND ...`.

Commands import what they need when they run, so that --help and a mistake cost no second.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config.profile import add_profile_option, check_profile
from pretrain.errors import UserError

OURS = ("kernels", "parallel", "launch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake prints one message and gives 2, Ctrl-C gives 130."""
    try:
        try:
            check_packages()
            args = parse(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that has left is no error; not when Python exits
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def check_packages() -> None:
    """Raises UserError if another package took the place of one of ours: PyPI has a `kernels`, ROS a `launch`."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found.parent.parent != home:
            raise UserError(
                f"the package {name!r} is {'missing' if found is None else f'another one, in {found.parent}'}; this "
                f"program's own is in {home}: uninstall the other, or run from a virtual environment of its own"
            )


# -- commands --------------------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from pretrain.data import prepare

    prepare.main(args)
    return 0


def _train(args: argparse.Namespace) -> int:
    from pretrain.config.load import help_config

    if args.help_config:
        print(help_config(), end="")
        return 0
    if args.config is None:
        raise UserError(
            "name a config file or a run's folder, for example: python -m pretrain train configs/gpt/demo.yaml"
        )
    from parallel.layout import rank_and_world
    from pretrain.data.sources import Sources
    from pretrain.runs import open_config

    config = open_config(args.config, args.overrides, rank_and_world()[1])
    sources = Sources.open(config)
    if args.profile is not None:
        from pretrain.schedule import Plan

        check_profile(args.profile, Plan(config, sources.train.samples_per_epoch).total_steps)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes when it starts and stops
    from pretrain import session

    return session.main(config, sources, args.profile)


def _sweep(args: argparse.Namespace) -> int:
    from pretrain import sweep

    return sweep.main(args)


def _predict(args: argparse.Namespace) -> int:
    if args.features is not None:
        from pretrain import features

        return features.main(args)
    if args.pool is not None:
        raise UserError("--pool: has no effect without --features")
    from pretrain import predict

    return predict.main(args)


def _evaluate(args: argparse.Namespace) -> int:
    from pretrain import evaluate

    return evaluate.main(args)


def _average(args: argparse.Namespace) -> int:
    from pretrain import average

    return average.main(args)


def _harness(args: argparse.Namespace) -> int:
    from pretrain import harness

    return harness.main(args)


def _generate(args: argparse.Namespace) -> int:
    from pretrain import generate

    return generate.main(args)


def _verify(args: argparse.Namespace) -> int:
    from pretrain import verify

    return verify.main(args)


def _export(args: argparse.Namespace) -> int:
    from pretrain.huggingface import export

    return export.main(args)


def _import(args: argparse.Namespace) -> int:
    from pretrain.huggingface import importing

    return importing.main(args)


def _inspect(args: argparse.Namespace) -> int:
    from pretrain import inspect

    return inspect.main(args)


def _tensorboard(args: argparse.Namespace) -> int:
    folders = {run: Path(run) / "tensorboard" for run in args.runs}
    missing = [run for run, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise UserError(
            f"no TensorBoard files in {', '.join(missing)}: these are no runs' folders, or monitor.tensorboard is off"
        )
    names = ",".join(f"{Path(run).resolve().name}:{folder}" for run, folder in folders.items())
    command = ["-m", "tensorboard.main", "--logdir_spec", names, "--port", str(args.port), "--host", args.host]
    os.execv(sys.executable, [sys.executable, *command])


# -- options ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; a mistake among them exits 2. Overrides may stand after the options too, where argparse
    leaves them, and options of another program where the command has them."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if hasattr(args, "of_lm_eval"):
        args.of_lm_eval, rest = rest, []
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Pre-train and use Transformer language models.",
        epilog="example: python -m pretrain train configs/gpt/demo.yaml optimizer.learning_rate=1e-3",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, words: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=words, description=words, epilog=f"example: python -m pretrain {example}"
        )
        command.set_defaults(run=run)
        return command

    _prepare_options(
        add("prepare", _prepare, "Text to shards of tokens.", "prepare corpus/ --out shards --vocab-size 8192")
    )
    train = add("train", _train, "Train, or go on training.", "train configs/gpt/demo.yaml run.seed=2")
    train.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, or a run's folder to go on with")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file")
    train.add_argument(
        "--help-config", action="store_true", help="print every field with its default and meaning, as YAML"
    )
    add_profile_option(train)
    verify = add(
        "verify",
        _verify,
        "Show that layouts train the same.",
        'verify configs/gpt/demo.yaml --layouts "tp=2" "pp=2,zero=1"',
    )
    verify.add_argument("config", metavar="CONFIG", help="a YAML file")
    verify.add_argument("overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file")
    verify.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="LAYOUT",
        help='such as "tp=2,sp,pp=2,zero=1,micro=2,recompute=full"',
    )
    verify.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps of each (default: 20)")
    verify.add_argument("--tiny", action="store_true", help="the same options at small sizes")
    verify.add_argument("--json", metavar="FILE", help="write the numbers here too")
    verify.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds a run may be silent (default: 600)"
    )
    _sweep_options(add)
    _use_options(add)
    _interchange_options(add)
    return top


def _prepare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "texts", nargs="*", metavar="TEXT", help="text files, .jsonl(.gz, .zst), folders, or - for standard input"
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="new folder for train/, validation/ and the report"
    )
    command.add_argument("--stdlib", action="store_true", help="the Python standard library's own sources as corpus")
    command.add_argument(
        "--pairs",
        action="store_true",
        help="TEXT is a table of sources and targets (.tsv, .csv, .jsonl), or two files whose lines belong together",
    )
    for side in ("source", "target"):
        text = f"with --pairs: tokens of a row's {side}s; a longer pair is left out (default: 128)"
        command.add_argument(f"--{side}-length", type=int, metavar="N", help=text)
    command.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="of the tokenizer that is trained (default: 8192, or what the text supports)",
    )
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="to use instead of training one: a SentencePiece .model, or Hugging Face's tokenizer.json, vocab.txt or folder",
    )
    command.add_argument("--model-type", choices=("bpe", "unigram"), help="kind of tokenizer to train (default: bpe)")
    command.add_argument("--user-symbols", nargs="+", metavar="TEXT", help="strings that always are one token")
    command.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="share of documents held out, by their hash (default: 0.01)",
    )
    command.add_argument(
        "--split", choices=("file", "blank-line"), help="what a document is in text files (default: file)"
    )
    command.add_argument("--text-field", metavar="NAME", help="field of JSON lines that holds the text (default: text)")
    command.add_argument(
        "--tokens-per-chunk", type=int, metavar="N", help="tokens a chunk (default: 524288, less for a small corpus)"
    )
    command.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes that tokenize (default: one a core); never changes the result",
    )
    command.add_argument(
        "--max-train-bytes",
        type=int,
        metavar="N",
        help="text that the tokenizer is trained on, at most (default: 32 MiB)",
    )
    command.add_argument("--seed", type=int, metavar="N", help="of the tokenizer's sample and the split (default: 0)")
    command.add_argument(
        "--strict", action="store_true", help="stop at the first document that cannot be read, instead of counting it"
    )


def _sweep_options(add: object) -> None:
    assert callable(add)
    sweep = add(
        "sweep",
        _sweep,
        "Many runs of one config: seeds, or a search over its fields.",
        "sweep configs/finetune/classification.yaml --out sweeps/reviews --seeds-weights 5 --seeds-order 5 --keep 8 --at 0.3",
    )
    sweep.add_argument("config", metavar="CONFIG", help="a YAML file")
    sweep.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="what is to differ from the file, in all"
    )
    sweep.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of a sweep that was stopped")
    sweep.add_argument(
        "--seeds-weights", type=int, default=1, metavar="N", help="seeds of the initial weights (default: 1)"
    )
    sweep.add_argument("--seeds-order", type=int, default=1, metavar="N", help="seeds of the data's order (default: 1)")
    sweep.add_argument(
        "--first-seed", type=int, default=1, metavar="N", help="the first of either, and of draws (default: 1)"
    )
    sweep.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="PATH=VALUES",
        help="a,b,c; or low..high, low..high:log with --trials",
    )
    sweep.add_argument(
        "--trials", type=int, metavar="N", help="draw so many of the search's values instead of all combinations"
    )
    sweep.add_argument("--keep", type=int, metavar="P", help="trials that go on after --at")
    sweep.add_argument(
        "--at", type=float, default=0.3, metavar="F", help="with --keep: share of the schedule (default: 0.3)"
    )
    sweep.add_argument(
        "--halving", action="store_true", help="successive halving: a third goes on at each third of the way"
    )


def _use_options(add: object) -> None:
    """Options of the commands that use what was prepared or trained."""
    assert callable(add)
    evaluate = add(
        "evaluate",
        _evaluate,
        "Loss and bits per byte of a text, or metrics of labelled examples or a task, as one JSON line.",
        "evaluate runs/demo --data shards/validation",
    )
    evaluate.add_argument("run_folder", metavar="RUN", help="folder of a run")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="DIR|TEXT", help="a folder of shards, a text file or a folder; or labelled examples"
    )
    what.add_argument(
        "--task",
        metavar="FILE",
        help="multiple choice (context, question, choices, answer) or cloze (source, target) for a model that was not tuned",
    )
    evaluate.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens scored a window (default: the model's length); less gives each more context",
    )
    evaluate.add_argument(
        "--shots", type=int, metavar="K", help="with --task: solved examples before each item (default: 0)"
    )
    evaluate.add_argument(
        "--examples", metavar="FILE", help="with --shots: draw them from here (default: from the task's other items)"
    )
    evaluate.add_argument("--seed", type=int, metavar="N", help="with --shots: of the drawing (default: 1)")
    evaluate.add_argument(
        "--normalize",
        choices=("none", "tokens", "bytes", "unconditional"),
        help="with --task: what a choice's log-probability is divided by, or set against (default: tokens)",
    )
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at once (default: 8)")
    evaluate.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    predict = add(
        "predict",
        _predict,
        "What a fine-tuned model says of each example, or the hidden states of any encoder or decoder, as JSON lines.",
        "predict runs/reviews --input new.tsv --out labels.jsonl",
    )
    predict.add_argument("run_folder", metavar="RUN", help="folder of a fine-tuned run")
    predict.add_argument("--input", required=True, metavar="FILE", help="examples; labels are not needed")
    predict.add_argument("--out", required=True, metavar="FILE", help="new file for the predictions")
    predict.add_argument(
        "--features",
        metavar="LAYERS",
        help="hidden states instead, of any run, of layers: 0 (the embeddings), 0,6,12, --features=-1 (the last), --features=-4:",
    )
    predict.add_argument(
        "--pool",
        choices=("mean", "first", "tokens"),
        help="with --features: the mean over a text's tokens (default), the state that stands for the text ([CLS]; of a "
        "decoder the last), or every token's: of CoNLL a token's first word piece",
    )
    predict.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences at once (default: 32)")
    predict.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    for command in (evaluate, predict):
        command.add_argument(
            "--beams", type=int, metavar="K", help="of pairs: hypotheses of the beam search (default: 4)"
        )
        command.add_argument(
            "--length-penalty",
            type=float,
            metavar="ALPHA",
            help="of pairs: 0 ranks by probability, more favours longer targets (default: 0.6)",
        )
    average = add(
        "average",
        _average,
        "The mean of a run's last checkpoints, as a run of its own.",
        "average runs/transformer-base --last 5 --out runs/averaged",
    )
    average.add_argument("run_folder", metavar="RUN", help="folder of a run")
    average.add_argument("--last", type=int, default=5, metavar="N", help="checkpoints to average (default: 5)")
    average.add_argument("--out", required=True, metavar="DIR", help="new folder for the averaged run")
    harness = add(
        "harness",
        _harness,
        "EleutherAI's lm-evaluation-harness with a run as its model; all options of `lm-eval run` can follow.",
        "harness runs/mine --tasks lambada_openai --num_fewshot 5 --batch_size 8",
    )
    harness.add_argument("run_folder", metavar="RUN", help="folder of a run")
    harness.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    harness.set_defaults(of_lm_eval=[])
    _generate_options(add)
    inspect = add("inspect", _inspect, "What a run or a folder of shards holds.", "inspect runs/demo")
    inspect.add_argument("path", metavar="RUN|DATA", help="folder of a run, or of shards")
    inspect.add_argument("--sample", type=int, metavar="N", help="of DATA: where sample number N lies, and its text")
    inspect.add_argument(
        "--seq-length", type=int, default=256, metavar="T", help="with --sample: tokens a sequence (default: 256)"
    )
    inspect.add_argument("--seed", type=int, default=1, metavar="N", help="with --sample: the run's seed (default: 1)")
    board = add("tensorboard", _tensorboard, "Open TensorBoard on runs.", "tensorboard runs/demo")
    board.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, side by side")
    board.add_argument("--port", type=int, default=6006, metavar="N", help="where it listens (default: 6006)")
    board.add_argument(
        "--host",
        default="localhost",
        metavar="NAME",
        help="who may connect: 0.0.0.0 for all (default: localhost, this machine)",
    )


def _generate_options(add: object) -> None:
    assert callable(add)
    generate = add(
        "generate", _generate, "Text by a trained model.", 'generate runs/demo --prompt "def main" --temperature 0.8'
    )
    generate.add_argument("run_folder", metavar="RUN", help="folder of a run")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with")
    generate.add_argument(
        "--raw", action="store_true", help="go on from the prompt itself, not from its template (tuned on instructions)"
    )
    generate.add_argument("--max-tokens", type=int, default=200, metavar="N", help="length at most (default: 200)")
    generate.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest (default: 0, all)")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest that together reach P (default: 1)"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="of the drawing (default: 1)")
    generate.add_argument("--num-samples", type=int, metavar="N", help="texts (default: 1)")
    generate.add_argument(
        "--beams", type=int, metavar="K", help="draw nothing: the likeliest text that K hypotheses find (1: greedy)"
    )
    generate.add_argument(
        "--length-penalty",
        type=float,
        metavar="ALPHA",
        help="with --beams: 0 ranks by probability, more favours longer texts (default: 0.6)",
    )
    generate.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")


def _interchange_options(add: object) -> None:
    """Options of the commands that give models to Hugging Face's transformers and take them from it."""
    assert callable(add)
    export = add(
        "export",
        _export,
        "A run's model as a Hugging Face folder, with the head and labels of its task.",
        "export runs/classification --out classifier",
    )
    export.add_argument("run_folder", metavar="RUN", help="folder of a run")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder: config.json, safetensors, tokenizer")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (default: fp32)"
    )
    export.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    command = add("import", _import, "A Hugging Face folder as a run.", "import classifier --out runs/imported")
    command.add_argument(
        "folder",
        metavar="DIR",
        help="config.json and safetensors of GPT-2, Llama, Mistral, GPT-NeoX or BERT, with a task's head or without",
    )
    command.add_argument("--out", required=True, metavar="RUN", help="new folder of the run")
    command.add_argument("--tokenizer", metavar="PATH", help="a tokenizer in place of the folder's, as for prepare")


if __name__ == "__main__":
    sys.exit(main())
