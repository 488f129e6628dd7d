"""`python -m pretrain export`: a run's model as a folder of Hugging Face's, ready for transformers.

OUT/config.json                               the architecture and its options
OUT/model.safetensors                         or several of a gigabyte, and model.safetensors.index.json
OUT/tokenizer.json, tokenizer_config.json     and tokenizer.model of a SentencePiece tokenizer
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint import Checkpoint, read_weight, weight_shapes
from pretrain.data.folder import whole_folder
from pretrain.errors import UserError
from pretrain.huggingface import vocabulary
from pretrain.huggingface.architecture import Architecture, Inexpressible, Json, Row, Settings, settings_of
from pretrain.huggingface.architectures import architecture_of
from pretrain.huggingface.forms import join, joined_shape
from pretrain.huggingface.progress import Bar
from pretrain.huggingface.tensors import INDEX, Planned, model_files, parts_of, write_model
from pretrain.loading import find_checkpoint
from pretrain.runs import run_config, run_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import vocabulary_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Exported(NamedTuple):
    """What was written."""

    architecture: str
    bytes: int
    notes: list[str]  # for people: where the folder is less than the run


def export(
    run: Path, out: Path, dtype: str = "fp32", step: int | None = None, say: Callable[[str], None] = print
) -> Exported:
    """Write the model of a run's newest checkpoint, or of one step's. Raises UserError, and leaves `out` as it was, where
    Hugging Face's architectures cannot express it."""
    config, tokenizer, found = run_config(run), run_tokenizer(run), find_checkpoint(run, step)
    ours = settings_of(config.model, vocabulary_of(config, tokenizer).size, config.data.seq_length)
    architecture, names = architecture_of(ours), weight_shapes(found)
    theirs, planned = architecture.config(ours, names), plan(architecture, ours, found)
    width = DTYPES[dtype].itemsize
    files = model_files(len(parts_of(planned, width)))
    with whole_folder(out, (*files, INDEX, "config.json", *vocabulary.FILES), say) as draft:
        text = json.dumps({**theirs, **_ids(tokenizer), "torch_dtype": str(DTYPES[dtype]).split(".")[1]}, indent=2)
        (draft / "config.json").write_text(text + "\n")
        vocabulary.write_tokenizer(draft, tokenizer, ours["max_positions"], segments=ours["segments"] > 0)
        with Bar("Exporting", sum(tensor.numel for tensor in planned) * width) as bar:
            write_model(draft, planned, DTYPES[dtype], bar.add)
    notes = [
        f"model.{name} {ours[name]} is left out: config.json has no place for it, and it changes training alone"
        for name in architecture.unsaid
        if ours[name]
    ]
    size = sum(tensor.numel for tensor in planned) * width
    return Exported(architecture.class_of(names), size, notes + vocabulary.notes(tokenizer))


def plan(architecture: Architecture, ours: Settings, found: Checkpoint) -> list[Planned]:
    """Their tensors, each made of ours from the checkpoint when its turn comes."""
    shapes = weight_shapes(found)
    try:
        rows = architecture.rows_of(ours["num_layers"], set(shapes))
    except Inexpressible as reason:
        raise UserError(f"{found.folder}: {reason}") from reason

    def planned(row: Row) -> Planned:
        def make() -> Tensor:
            return join(row, [read_weight(found, name) for name in row.ours], ours["num_heads"])

        return Planned(row.theirs, joined_shape(row, [shapes[name] for name in row.ours]), make)

    return [planned(row) for row in rows]


def _ids(tokenizer: Tokenizer) -> Json:
    return {f"{role}_token_id": tokenizer.special.get(role) for role in ("bos", "eos", "pad")}


def main(args: Namespace) -> int:
    """`python -m pretrain export`."""
    out = Path(args.out)
    done = export(Path(args.run_folder), out, args.dtype, args.checkpoint, lambda line: print(line, file=sys.stderr))
    print(f"{out}: {done.architecture}, {args.dtype}, {done.bytes:,} bytes of weights")
    for note in done.notes:
        print(f"note: {note}")
    return 0
