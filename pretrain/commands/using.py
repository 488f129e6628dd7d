"""The commands that use what was prepared or trained. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse

from pretrain.commands.adding import Add
from pretrain.errors import UserError


def _evaluate(args: argparse.Namespace) -> int:
    from pretrain import evaluate

    return evaluate.main(args)


def _predict(args: argparse.Namespace) -> int:
    if args.features is not None:
        from pretrain import features

        return features.main(args)
    if args.pool is not None:
        raise UserError("--pool: has no effect without --features")
    from pretrain import predict

    return predict.main(args)


def _harness(args: argparse.Namespace) -> int:
    from pretrain import harness

    return harness.main(args)


def _average(args: argparse.Namespace) -> int:
    from pretrain import average

    return average.main(args)


def _generate(args: argparse.Namespace) -> int:
    from pretrain import generate

    return generate.main(args)


def _inspect(args: argparse.Namespace) -> int:
    from pretrain import inspect

    return inspect.main(args)


def _tensorboard(args: argparse.Namespace) -> int:
    from pretrain import viewer

    return viewer.main(args)


# -- options ---------------------------------------------------------------------------------------------------------


def _logs(args: argparse.Namespace) -> int:
    from pretrain import logs

    return logs.main(args)


def _logs_options(add: Add) -> None:
    logs = add("logs", _logs, "What all ranks of a run told, by time.", "logs runs/demo --follow --lines 20")
    logs.add_argument("folder", metavar="RUN", help="a run's folder")
    logs.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    logs.add_argument("--lines", type=int, metavar="N", help="begin with the last N lines (default: all)")
    logs.add_argument("--rank", type=int, nargs="+", default=[], metavar="R", help="only these ranks")


def add_commands(add: Add) -> None:
    for command in (_evaluate_options(add), _predict_options(add)):
        command.add_argument(
            "--beams", type=int, metavar="K", help="of pairs: hypotheses of the beam search (default: 4)"
        )
        command.add_argument(
            "--length-penalty",
            type=float,
            metavar="ALPHA",
            help="of pairs: 0 ranks by probability, more favours longer targets (default: 0.6)",
        )
    _logs_options(add)
    _average_options(add)
    _harness_options(add)
    _generate_options(add)
    _inspect_options(add)
    _tensorboard_options(add)


def _evaluate_options(add: Add) -> argparse.ArgumentParser:
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
        "--validation",
        action="store_true",
        help="the run's own held-out data, that of each named source by itself too",
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
    return evaluate


def _predict_options(add: Add) -> argparse.ArgumentParser:
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
    return predict


def _average_options(add: Add) -> None:
    average = add(
        "average",
        _average,
        "The mean of a run's last checkpoints, as a run of its own.",
        "average runs/transformer-base --last 5 --out runs/averaged",
    )
    average.add_argument("run_folder", metavar="RUN", help="folder of a run")
    average.add_argument("--last", type=int, default=5, metavar="N", help="checkpoints to average (default: 5)")
    average.add_argument("--out", required=True, metavar="DIR", help="new folder for the averaged run")


def _harness_options(add: Add) -> None:
    harness = add(
        "harness",
        _harness,
        "EleutherAI's lm-evaluation-harness with a run as its model; all options of `lm-eval run` can follow.",
        "harness runs/mine --tasks lambada_openai --num_fewshot 5 --batch_size 8",
    )
    harness.add_argument("run_folder", metavar="RUN", help="folder of a run")
    harness.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    harness.set_defaults(of_lm_eval=[])


def _inspect_options(add: Add) -> None:
    inspect = add(
        "inspect",
        _inspect,
        "What a run or prepared data hold: counts, lengths, duplicates, decoded samples; and whether all is as it was written.",
        "inspect shards/train --sample 7",
    )
    inspect.add_argument(
        "path", metavar="RUN|DATA", help="folder of a run, or of shards; or a config file, whose sources are told"
    )
    inspect.add_argument(
        "--sample",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="of DATA: where sample number N lies, and what the model sees of it; may be given again",
    )
    inspect.add_argument(
        "--config",
        metavar="FILE",
        help="with --sample: by this config's order and objective: what is masked, positions",
    )
    inspect.add_argument(
        "--seq-length",
        type=int,
        metavar="T",
        help="with --sample, without a config: tokens (default: 256, or a packed row)",
    )
    inspect.add_argument(
        "--seed", type=int, metavar="N", help="with --sample, without a config: the run's (default: 1)"
    )
    inspect.add_argument(
        "--verify", action="store_true", help="of DATA: read all, compare every SHA-256 and id, name what is wrong"
    )
    inspect.add_argument("--json", action="store_true", help="of DATA: as one JSON value")


def _tensorboard_options(add: Add) -> None:
    board = add("tensorboard", _tensorboard, "Open TensorBoard on runs.", "tensorboard runs/demo runs/other")
    text = "folders of runs, side by side; of a sweep its own, or its runs' (DIR/trials/*/run)"
    board.add_argument("runs", nargs="+", metavar="RUN", help=text)
    board.add_argument("--port", type=int, metavar="N", help="where it listens (default: the first free from 6006 on)")
    board.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="where it listens: 0.0.0.0 lets everyone in (default: 127.0.0.1, this machine alone)",
    )


def _generate_options(add: Add) -> None:
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
