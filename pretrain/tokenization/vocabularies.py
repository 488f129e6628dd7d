"""Descriptions, as tokenizer.json has them, of tokenizers that came as bare vocabularies."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.errors import UserError
from pretrain.tokenization.library import Json


def wordpiece(content: bytes, name: str, told: Json) -> Json:
    """BERT's tokenizer from its vocab.txt (Devlin et al. 2019): in lower case as `told` tells, or, where it does not, if no
    piece has a capital letter."""
    pieces = list(_lines(content, name))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    missing = [symbol for symbol in ("[UNK]", "[CLS]", "[SEP]") if symbol not in vocabulary]
    if missing:
        raise UserError(f"{name} is no WordPiece vocabulary: it has no {', '.join(missing)}.")
    lower = told.get("do_lower_case")
    if lower is None:
        lower = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": told.get("tokenize_chinese_chars", True),
            "strip_accents": told.get("strip_accents"),
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"]), 1),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def template(opening: tuple[str, int] | None, closing: tuple[str, int], second: int) -> Json:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP] with another segment for B. opening, closing: a piece and its id."""

    def symbol(name: str, segment: int = 0) -> Json:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    def text(name: str, segment: int = 0) -> Json:
        return {"Sequence": {"id": name, "type_id": segment}}

    begin = [] if opening is None else [opening]
    single = [*(symbol(name) for name, _ in begin), text("A"), symbol(closing[0])]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", second), symbol(closing[0], second)],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in (*begin, closing)},
    }


def byte_level(vocabulary: Json, merges: bytes, name: str, told: Json) -> Json:
    """GPT-2's tokenizer from vocab.json and merges.txt (`name` is the latter's)."""
    pairs = []
    for number, line in enumerate(_lines(merges, name), start=1):
        pair = line.split(" ")
        if len(pair) == 2 and not line.startswith("#version"):
            pairs.append(pair)
        elif line and not line.startswith("#version"):
            raise UserError(f"{name}, line {number}: {len(pair)} pieces where two that merge are expected.")
    if any(piece.endswith("</w>") for piece in vocabulary):
        raise UserError(f"{name}: not byte-level BPE as GPT-2's is; bring a tokenizer.json, which tells of itself.")
    space = told.get("add_prefix_space", False)
    step = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": {**step, "trim_offsets": False},
        "decoder": step,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": pairs,
        },
    }


def _lines(content: bytes, name: str) -> Iterator[str]:
    """Lines without their ends; the last may lack one. U+2028 and its like are pieces as any others."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}, line {number}: not UTF-8 (byte {error.start}).") from error
    for line in text.removesuffix("\n").split("\n"):
        yield line.removesuffix("\r")
