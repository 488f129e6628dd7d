"""A tokenizer as files that transformers' AutoTokenizer loads as they are, and back.

One of Hugging Face's goes out as it came in. A SentencePiece model goes out twice: as it is, and written anew as a
tokenizer.json that gives the same ids. On the way in it is known by that: where a folder's tokenizer.json is what is made of
its tokenizer.model, the latter is the tokenizer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.library import Json, Library, parse_json
from pretrain.tokenization.pieces import CONTROLS, SPACE, Pieces
from pretrain.tokenization.vocabularies import template

FILES = ("tokenizer.json", "tokenizer_config.json", Pieces.file)
TWO = ("source.spm", "target.spm", "vocab.json")  # MarianTokenizer's
NEVER = -1e5  # score of a piece that no text may become: some thousand pieces' worth
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece's types of pieces


class Use(NamedTuple):
    """What a model takes texts as. length: of its longest, in tokens. segments: whether it takes token_type_ids. opening,
    closing: roles that stand before all texts and behind each (None: as the tokenizer has it); second: the segment of a
    second text. special: the model's ids by role, of which the tokenizer may lack some. sentinels: ids behind the
    tokenizer's, of span corruption's first span and on."""

    length: int
    segments: bool = False
    opening: str | None = None
    closing: str | None = None
    second: int = 0
    special: Mapping[str, int] = {}
    sentinels: Sequence[int] = ()


def write_tokenizer(folder: Path, tokenizer: Tokenizer, use: Use) -> None:
    """Write its files. Raises UserError for a SentencePiece model that tokenizer.json cannot express."""
    behind = _lacking(tokenizer, use)
    pieces = {index: tokenizer.piece(index) for index in tokenizer.special.values()} | behind
    roles = {role: pieces[index] for role, index in {**use.special, **tokenizer.special}.items()}
    if isinstance(tokenizer, Pieces):
        (folder / Pieces.file).write_bytes(tokenizer.content)
        description = description_of(tokenizer.content)
    else:
        assert isinstance(tokenizer, Library)
        description = {**tokenizer.description, "truncation": None, "padding": None}
    added = [{"id": index, "content": name, **ADDED, "special": True} for index, name in sorted(behind.items())]
    description["added_tokens"] = [*(description.get("added_tokens") or []), *added]
    if use.closing is not None:
        opening = None if use.opening is None else (roles[use.opening], use.special[use.opening])
        frame = template(opening, (roles[use.closing], use.special[use.closing]), use.second)
        description["post_processor"] = _framed(description.get("post_processor"), frame)
    (folder / "tokenizer.json").write_bytes(_dumped(description))
    (folder / "tokenizer_config.json").write_bytes(_dumped(_config(roles, use)))


def _config(roles: dict[str, str], use: Use) -> Json:
    """tokenizer_config.json."""
    if roles.get("sep") == roles["eos"] and "bos" not in roles:
        roles = {
            role: piece for role, piece in roles.items() if role != "eos"
        }  # [SEP], which their models do not end at
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": piece for role, piece in roles.items()},
        "model_max_length": use.length,
        "model_input_names": ["input_ids", *(["token_type_ids"] if use.segments else []), "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **({"additional_special_tokens": _sentinel_names(use)} if use.sentinels else {}),
    }


def _lacking(tokenizer: Tokenizer, use: Use) -> dict[int, str]:
    """Names for the control symbols that the tokenizer lacks, which no text has. Raises UserError where there are none."""
    behind = {role: index for role, index in use.special.items() if index >= tokenizer.vocab_size}
    wished: dict[str, Sequence[str]] = {role: CONTROLS[role] for role in behind}
    for mark, index in zip(_sentinel_names(use), use.sentinels, strict=True):
        behind[mark], wished[mark] = index, (mark,)
    if not behind:
        return {}
    held = {tokenizer.piece(index) for index in range(tokenizer.vocab_size)}
    names = {role: next((name for name in wished[role] if name not in held), None) for role in behind}
    for role, name in names.items():
        if name is None or "" in held:
            raise UserError(
                f"The tokenizer has no {role} symbol, and its ids or pieces leave no place for one behind them: no "
                "tokenizer.json gives the model's ids, so this cannot be exported."
            )
    return {index: str(names[role]) for role, index in behind.items()}


def _sentinel_names(use: Use) -> list[str]:
    """T5's, the first span's first."""
    return [f"<extra_id_{number}>" for number in range(len(use.sentinels))]


def _framed(before: Json | None, frame: Json) -> Json:
    """The frame in place of another; what gives byte-level pieces their offsets stays."""
    steps = [before] if before is None or before["type"] != "Sequence" else before["processors"]
    kept = [step for step in steps if step is not None and step["type"] == "ByteLevel"]
    return {"type": "Sequence", "processors": [*kept, frame]} if kept else frame


def notes(tokenizer: Tokenizer) -> list[str]:
    """For people: where the written files are less than the tokenizer."""
    if not isinstance(tokenizer, Pieces):
        return []
    description, told = description_of(tokenizer.content), []
    if description["model"]["type"] == "Unigram":
        told.append("tokenizer.json may choose another of several segmentations with the same unigram score")
    if any(step["type"] == "Precompiled" for step in description["normalizer"]["normalizers"]):
        told.append("tokenizer.json may normalise characters with combining marks otherwise than SentencePiece does")
    return told


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, or that of a file. Raises UserError where it has none, or one for either side of a pair."""
    model, described = folder / Pieces.file, folder / "tokenizer.json"
    if (folder / TWO[0]).is_file() and not described.is_file():
        raise UserError(
            f"{folder}: its tokenizer is {', '.join(TWO)}: two SentencePiece models, one for sources and one for targets, but "
            "a model here has one for both. Put a tokenizer.json that gives the same ids into the folder, or import it "
            "with --tokenizer FILE."
        )
    if model.is_file() and described.is_file():
        pieces = load_tokenizer(model)
        if _is_of(parse_json(described.read_bytes(), str(described)), pieces):
            return pieces
    return load_tokenizer(folder)


def _is_of(description: Json, pieces: Tokenizer) -> bool:
    """Whether it was made of the SentencePiece model, whatever frame and symbols of the model's own were put to it."""
    own = description_of(pieces.content)
    added = [token for token in description.get("added_tokens") or [] if token["id"] < pieces.vocab_size]
    return {**description, "added_tokens": added, "post_processor": None} == own


def longest(folder: Path) -> int | None:
    """Tokens of the longest text, where the folder tells it."""
    path = folder / "tokenizer_config.json"
    length = parse_json(path.read_bytes(), str(path)).get("model_max_length") if path.is_file() else None
    return length if type(length) is int and length > 0 else None


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


# -- SentencePiece's model as tokenizer.json -----------------------------------------------------------------------------


def description_of(content: bytes) -> Json:
    """tokenizer.json of a SentencePiece model: BPE merges by score, or unigram scores. Raises UserError for one that has
    no equal there."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(content)  # type: ignore[attr-defined]
    _check(proto)
    prefix = proto.normalizer_spec.add_dummy_prefix
    added = [
        {"id": index, "content": _content(piece), **ADDED, "special": piece.type != USER_DEFINED}
        for index, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        and " " not in piece.piece  # SentencePiece never finds a space
    ]
    space: list[Json] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    strip: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto),
    }


UNIGRAM, BPE = 1, 2
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _check(proto: Any) -> None:
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    symbols = any(piece.type == USER_DEFINED for piece in proto.pieces)
    problem = ""
    if trainer.model_type not in (UNIGRAM, BPE):
        problem = "is neither BPE nor unigram"
    elif symbols and (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        problem = "has user-defined symbols, and adds or removes spaces at the ends of a text"
    elif trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        problem = "treats spaces in a way of its own (suffix, or not escaped)"
    elif any(piece.type not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE) for piece in proto.pieces):
        problem = "has pieces that it never uses"
    if problem:
        raise UserError(f"The tokenizer {problem}: no tokenizer.json gives the same ids, so this cannot be exported.")


def _normalizers(spec: Any) -> list[Json]:
    steps: list[Json] = []
    if spec.precompiled_charsmap:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        )
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _content(piece: Any) -> str:
    """A user's symbol is looked for in the text itself, where a space is a space."""
    return piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece


def _bpe(proto: Any) -> Json:
    """SentencePiece joins the neighbours whose join has the best score; tokenizers joins by a list of pairs. So that list
    has every pair of pieces that makes a piece, by its score."""
    vocabulary = {_content(piece): index for index, piece in enumerate(proto.pieces)}
    parts = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    merges: list[tuple[float, int, list[str]]] = []
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        if piece.type == NORMAL:
            pairs = ([text[:place], text[place:]] for place in range(1, len(text)))
            merges += [(-piece.score, index, pair) for pair in pairs if pair[0] in parts and pair[1] in parts]
    merges.sort(key=lambda merge: merge[:2])
    unknown = next((piece.piece for piece in proto.pieces if piece.type == UNKNOWN), None)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [pair for _, _, pair in merges],
    }


def _unigram(proto: Any) -> Json:
    scored = [[_content(piece), piece.score if piece.type == NORMAL else NEVER] for piece in proto.pieces]
    unknown = next((index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    return {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": proto.trainer_spec.byte_fallback}
