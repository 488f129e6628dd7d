"""The commands that give models to Hugging Face's transformers and take them from it."""

from __future__ import annotations

import argparse

from pretrain.commands.adding import Add


def _export(args: argparse.Namespace) -> int:
    from pretrain.huggingface import export

    return export.main(args)


def _import(args: argparse.Namespace) -> int:
    from pretrain.huggingface import importing

    return importing.main(args)


def add_commands(add: Add) -> None:
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
