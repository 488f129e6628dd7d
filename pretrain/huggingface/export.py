"""`python -m pretrain export`: a run's model as a folder of Hugging Face's, ready for transformers.

OUT/config.json                               the architecture and its options
OUT/model.safetensors                         or several of a gigabyte, and model.safetensors.index.json
OUT/tokenizer.json, tokenizer_config.json     and tokenizer.model of a SentencePiece tokenizer
OUT/generation_config.json                    of an encoder-decoder
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

from pretrain.config.run import Config
from pretrain.data.folder import whole_folder
from pretrain.errors import UserError
from pretrain.finetuning.opening import run_labels
from pretrain.huggingface import vocabulary
from pretrain.huggingface.architecture import Architecture, Inexpressible, Json, Settings, settings_of
from pretrain.huggingface.architectures import architecture_of
from pretrain.huggingface.forms import fixed_shape, fixed_values, join, joined_shape
from pretrain.huggingface.heads import left_out, write_labels
from pretrain.huggingface.progress import Bar
from pretrain.huggingface.rows import Fixed, ModelClass, Row
from pretrain.huggingface.tensors import INDEX, Planned, model_files, parts_of, write_model
from pretrain.huggingface.vocabulary import Use
from pretrain.loading import find_checkpoint
from pretrain.merging import Merged
from pretrain.runs import run_config, run_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.translation import Search
from pretrain.vocabulary import Vocabulary, vocabulary_of

GENERATION = "generation_config.json"
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
    config, tokenizer = run_config(run), run_tokenizer(run)
    found = Merged(find_checkpoint(run, step), config.model)
    words = vocabulary_of(config, tokenizer)
    ours = settings_of(config.model, words.size, max(length for _, length in config.lengths))
    architecture, shapes = architecture_of(ours), found.shapes
    try:
        kind = architecture.class_of(config.objective.kind, shapes)
        planned = plan(architecture, kind, ours, found)
    except Inexpressible as reason:
        raise UserError(f"{run}: {reason}") from reason
    ids = {**_ids(config, tokenizer), **{name: tokenizer.eos for name, _ in architecture.ends}}
    theirs = {**architecture.config(ours, kind), **ids}
    if config.objective.has_head:
        theirs |= write_labels(config.objective.kind, run_labels(run))
    width = DTYPES[dtype].itemsize
    files = model_files(len(parts_of(planned, width)))
    with whole_folder(out, (*files, INDEX, "config.json", GENERATION, *vocabulary.FILES), say) as draft:
        text = json.dumps({**theirs, "torch_dtype": str(DTYPES[dtype]).split(".")[1]}, indent=2, ensure_ascii=False)
        (draft / "config.json").write_text(text + "\n")
        if config.model.kind == "encoder-decoder":
            generation = {**_search(ours["max_positions"]), **ids}
            (draft / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        vocabulary.write_tokenizer(draft, tokenizer, use_of(config, words, ours["max_positions"]))
        with Bar("Exporting", sum(tensor.numel for tensor in planned) * width) as bar:
            write_model(draft, planned, DTYPES[dtype], bar.add)
    size = sum(tensor.numel for tensor in planned) * width
    return Exported(kind.name, size, _notes(config, architecture, ours, tokenizer))


def plan(architecture: Architecture, kind: ModelClass, ours: Settings, found: Merged) -> list[Planned]:
    """Their tensors, each made of ours from the checkpoint when its turn comes. Raises Inexpressible."""
    shapes = found.shapes

    def planned(row: Row) -> Planned:
        def make() -> Tensor:
            return join(row, [found.read(name) for name in row.ours], ours["num_heads"])

        return Planned(row.theirs, joined_shape(row, [shapes[name] for name in row.ours]), make)

    def fixed(tensor: Fixed) -> Planned:
        return Planned(tensor.theirs, fixed_shape(tensor, ours), lambda: fixed_values(tensor, ours))

    made = [planned(row) for row in architecture.rows_of(kind, ours, set(shapes))]
    return made + [fixed(tensor) for tensor in kind.fixed]


def use_of(config: Config, words: Vocabulary, longest: int) -> Use:
    """What the tokenizer is used for. A task's model takes texts as it was trained on, cut to the same length; an encoder
    that stands before a decoder, each text with its end."""
    model, task = config.model, config.objective.has_head
    length = config.data.seq_length if task else longest
    segments = model.num_segments > 0
    if model.kind == "encoder-decoder":
        return Use(length, segments, None, "eos", 0, words.special, words.sentinels)
    if not model.causal:
        return Use(length, segments, "cls", "sep", int(model.num_segments > 1), words.special)
    return Use(length, segments, None, "eos" if task else None, 0, words.special)


def _ids(config: Config, tokenizer: Tokenizer) -> Json:
    ids = {f"{role}_token_id": tokenizer.special.get(role) for role in ("bos", "eos", "pad")}
    return {**ids, "pad_token_id": None} if _lacks_padding(config, tokenizer) else ids


def _search(longest: int) -> Json:
    """How transformers' `generate` is to write: else it would take 20 tokens at most. Of a length penalty nothing is said,
    since theirs is another function of the length. longest: tokens of a target."""
    return {"num_beams": Search().beams, "max_length": longest + 1}  # theirs counts the start


def _lacks_padding(config: Config, tokenizer: Tokenizer) -> bool:
    """Whether a decoder's class, which looks for the last token that is no padding, could not tell it from the text's, or an
    encoder's texts, which transformers pads to one length, have nothing to be padded with."""
    if config.model.kind == "encoder-decoder":
        return "pad" not in tokenizer.special
    pad = tokenizer.special.get("pad", tokenizer.eos)
    return config.objective.has_head and config.model.causal and pad == tokenizer.eos


def _notes(config: Config, architecture: Architecture, ours: Settings, tokenizer: Tokenizer) -> list[str]:
    told = [
        f"model.{name} {ours[name]} is left out: config.json has no place for it, and it changes training alone"
        for name in architecture.unsaid
        if ours[name]
    ]
    if _lacks_padding(config, tokenizer):
        told.append("the tokenizer has no padding of its own, so transformers takes one text at a time")
    return told + left_out(config.objective) + vocabulary.notes(tokenizer)


def main(args: Namespace) -> int:
    """`python -m pretrain export`."""
    out = Path(args.out)
    done = export(Path(args.run_folder), out, args.dtype, args.checkpoint, lambda line: print(line, file=sys.stderr))
    print(f"{out}: {done.architecture}, {args.dtype}, {done.bytes:,} bytes of weights")
    for note in done.notes:
        print(f"note: {note}")
    return 0
