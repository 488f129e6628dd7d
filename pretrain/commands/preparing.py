"""The command that makes shards: prepare. It imports what it needs when it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pretrain.commands.adding import Add
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.preparing.options import Options, Report

OF_LATER_PARTS = (
    "out",
    "task",
    "tasks",
    "stage",
    "cluster",
    "merge",
    "processes",
    "timeout",
    "strict",
)  # what --task and --merge take
AS_GIVEN = ("run", *OF_LATER_PARTS)


def _prepare(args: argparse.Namespace) -> int:
    from pretrain.data.progress import print_report

    if (report := _report(args)) is not None:
        print_report(report, args.out)
    return 0


def _report(args: argparse.Namespace) -> Report | None:
    """What was prepared; None where only a part of the work was asked for."""
    from pretrain.data import prepare
    from pretrain.data.preparing.pool import TIMEOUT

    timeout = TIMEOUT if args.timeout is None else args.timeout
    if not timeout > 0:
        raise UserError(f"--timeout is a time in seconds, not {timeout}.")
    if (args.task is None) != (args.tasks is None):
        raise UserError("--task I and --tasks N belong together: this task's number from 0 on, and how many there are.")
    _check_part(args)
    if args.task is not None:
        stage = args.stage or "encode"
        prepare.do_task(args.out, args.task, args.tasks, args.processes, None, args.strict, timeout, stage)
        return None
    if args.stage is not None:
        raise UserError("--stage: has no effect without --task")
    if args.cluster:
        prepare.cluster_only(args.out, args.processes, strict=args.strict, timeout=timeout)
        return None
    if args.merge:
        return prepare.merge_only(args.out, args.processes, strict=args.strict, timeout=timeout)
    options = _options_of(args)
    if args.sample is not None and not args.dry_run:
        raise UserError("--sample: has no effect without --dry-run")
    if args.dry_run:
        for line in prepare.rehearse(args.texts, options, args.stdlib, args.processes, args.sample):
            print(line)
        return None
    if args.pairs:
        return _pairs(args, options)
    if (args.source_length, args.target_length) != (None, None):
        raise UserError("--source-length and --target-length are of the rows that --pairs makes.")
    shared = {"stdlib": args.stdlib, "processes": args.processes, "restart": args.restart, "timeout": timeout}
    if args.plan:
        plan = prepare.plan_only(args.texts, args.out, options, **shared)
        print(f"{plan.pieces:,} pieces of {plan.files:,} files, {plan.bytes:,} bytes. Next, in any order and number N:")
        again = f"  python -m pretrain prepare --out {args.out}"
        if plan.compares:
            print(f"{again} --task I --tasks N --stage sign   for I from 0 to N - 1")
            print(f"{again} --cluster                         when all have ended")
        print(f"{again} --task I --tasks N   for I from 0 to N - 1")
        print(f"{again} --merge              when all have ended")
        return None
    return prepare.prepare(args.texts, args.out, options, **shared)


def _check_part(args: argparse.Namespace) -> None:
    """Raises UserError where an option would have no effect."""
    parts = [
        name
        for name, given in (
            ("--dry-run", args.dry_run),
            ("--plan", args.plan),
            ("--task", args.task is not None),
            ("--cluster", args.cluster),
            ("--merge", args.merge),
        )
        if given
    ]
    if len(parts) > 1:
        raise UserError(f"{' and '.join(parts)} are different parts of the work: give one at a time.")
    if parts and parts[0] not in ("--plan", "--dry-run"):
        idle = [name for name, value in vars(args).items() if name not in AS_GIVEN and value not in (None, False, [])]
        if idle:
            names = ", ".join("the texts" if name == "texts" else f"--{name.replace('_', '-')}" for name in idle)
            raise UserError(f"{names}: belong to --plan, which has settled what {parts[0]} does; leave them out.")
    if args.pairs and (parts or args.restart or args.timeout is not None):
        raise UserError(f"--pairs are prepared in one go: leave out {', '.join(parts) or '--restart and --timeout'}.")


def _options_of(args: argparse.Namespace) -> Options:
    from pretrain.data.preparing.options import Options

    given = {
        name: getattr(args, name) for name in Options.__dataclass_fields__ if getattr(args, name, None) is not None
    }
    return Options(**{**given, "user_symbols": tuple(given.get("user_symbols", ()))})


def _pairs(args: argparse.Namespace, options: Options) -> Report:
    from pretrain.data.pairs import SOURCE_LENGTH, TARGET_LENGTH, Lengths, prepare_pairs
    from pretrain.data.prepare import processes_of

    if (options.packing, options.seq_length) != ("concat", None):
        raise UserError("--packing and --seq-length are of text; --pairs has --source-length and --target-length.")
    if args.stdlib:
        raise UserError("--stdlib is text, not pairs: leave it out, or --pairs.")
    sides = Lengths(args.source_length or SOURCE_LENGTH, args.target_length or TARGET_LENGTH)
    return prepare_pairs(args.texts, args.out, sides, options, processes_of(args.processes))


def add_commands(add: Add) -> None:
    _prepare_options(
        add("prepare", _prepare, "Text to shards of tokens.", "prepare corpus/ --out shards --vocab-size 8192")
    )


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
    _tokenizer_options(command)
    _document_options(command)
    command.add_argument(
        "--tokens-per-chunk", type=int, metavar="N", help="tokens a chunk (default: 524288, less for a small corpus)"
    )
    command.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes that tokenize (default: one a core); never changes the result",
    )
    command.add_argument("--seed", type=int, metavar="N", help="of the tokenizer's sample and the split (default: 0)")
    command.add_argument(
        "--strict", action="store_true", help="stop at the first document that cannot be read, instead of counting it"
    )
    command.add_argument(
        "--piece-bytes",
        type=int,
        metavar="N",
        help="text that a process does at a time (default: 4 to 64 MiB, by the size of the corpus)",
    )
    _part_options(command)


def _tokenizer_options(command: argparse.ArgumentParser) -> None:
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
        "--max-train-bytes",
        type=int,
        metavar="N",
        help="text that the tokenizer is trained on, at most (default: 32 MiB)",
    )


def _document_options(command: argparse.ArgumentParser) -> None:
    """What a document is, which are kept, and how they lie in rows."""
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
        "--select",
        metavar="FILE",
        help="what is kept, as YAML: duplicates, rules, language, quality (see configs/selection)",
    )
    command.add_argument(
        "--eos-id",
        type=int,
        metavar="ID",
        help="of Megatron-LM's files: the id that ends a document (default: found out)",
    )
    command.add_argument(
        "--packing",
        choices=("concat", "fit", "sentences"),
        help="documents one behind the other, cut anywhere (concat, the default), whole in rows by best fit (fit), or a row "
        "of whole sentences of one document (sentences, for BERT)",
    )
    command.add_argument(
        "--seq-length", type=int, metavar="T", help="with --packing fit or sentences: tokens of a row, data.seq_length"
    )


def _part_options(command: argparse.ArgumentParser) -> None:
    """Those of work in several parts, and of work that was interrupted."""
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: tell from a sample what would be kept and dropped, and what would be written",
    )
    command.add_argument("--sample", type=int, metavar="N", help="with --dry-run: documents to look at (default: 2000)")
    command.add_argument("--restart", action="store_true", help="throw away what an interrupted start left unfinished")
    command.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="with several processes: seconds after which one that gives no sign of life is replaced (default: 600)",
    )
    command.add_argument(
        "--plan", action="store_true", help="only cut the texts into pieces and settle the tokenizer: for --task"
    )
    command.add_argument(
        "--task", type=int, metavar="I", help="with --tasks: encode every N-th piece of a plan from I on"
    )
    command.add_argument("--tasks", type=int, metavar="N", help="with --task: how many tasks share the pieces")
    command.add_argument(
        "--stage",
        choices=("sign", "encode"),
        help="with --task, of a plan whose selection looks for copies: sign, then --cluster, then encode (the default)",
    )
    command.add_argument(
        "--cluster",
        action="store_true",
        help="when all pieces of such a plan are signed: find the copies, settle the tokenizer",
    )
    command.add_argument("--merge", action="store_true", help="when all pieces of a plan are encoded: write the shards")
