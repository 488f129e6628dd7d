"""A tokenizer from a path: which kind it is, and one file of several.

    FILE.model                     SentencePiece
    tokenizer.json                 Hugging Face's `tokenizers`, with tokenizer_config.json beside it for the roles
    vocab.txt                      a WordPiece vocabulary, one piece a line (BERT)
    vocab.json and merges.txt      byte-level BPE (GPT-2)
    a folder                       the first of tokenizer.json, a single *.model, vocab.txt, vocab.json that it holds

Files are parsed, with limits, and never executed. Where no role of a document's end is told, it is [SEP].
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.errors import UserError
from pretrain.tokenization.base import MAX_BYTES, ROLES, Tokenizer, by_role
from pretrain.tokenization.library import Json, Library, parse_json
from pretrain.tokenization.pieces import Pieces
from pretrain.tokenization.vocabularies import byte_level, wordpiece

KINDS: tuple[type[Library] | type[Pieces], ...] = (Pieces, Library)
FILES = tuple(kind.file for kind in KINDS)  # names of a tokenizer beside shards and in a run's folder
# Where no configuration tells the roles: the names that they have in the tokenizers in use.
USUAL = {
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
}


def open_tokenizer(file: str, content: bytes, name: str | None = None) -> Tokenizer:
    """The tokenizer of the content of a file of one of the names in FILES. Raises UserError if it is none."""
    for kind in KINDS:
        if kind.file == file:
            return kind(content, name or file)
    raise ValueError(f"{file} is no name of a tokenizer's file")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer of any kind (see the module). Raises UserError if it is missing or none."""
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    content = _read(path)
    if path.suffix == ".json" or path.suffix == ".txt":
        return Library(_one_file(path, content), str(path))
    return Pieces(content, str(path))


def _in_folder(folder: Path) -> Path:
    models = sorted(folder.glob("*.model"))
    candidates = ["tokenizer.json", *([models[0].name] if len(models) == 1 else ()), "vocab.txt", "vocab.json"]
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no tokenizer: none of {', '.join(dict.fromkeys([*candidates, '*.model']))}.")


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from error
    if not content or len(content) > MAX_BYTES:
        raise UserError(f"{path} is not a tokenizer: it has {len(content)} bytes.")
    return content


# -- one file of several ---------------------------------------------------------------------------------------------


def _one_file(path: Path, content: bytes) -> bytes:
    told = _told(path.parent)
    if path.suffix == ".txt":
        return _with_roles(wordpiece(content, str(path), told), told, path)
    description = parse_json(content, str(path))
    if path.name == "vocab.json":
        merges = path.with_name("merges.txt")
        description = byte_level(description, _read(merges), str(merges), told)
    return content if "special" in description else _with_roles(description, told, path)


def _told(folder: Path) -> Json:
    """What the folder's configuration tells of its tokenizer."""
    told: Json = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            told.update(parse_json(_read(folder / name), str(folder / name)))
    return told


def _with_roles(description: Json, told: Json, path: Path) -> bytes:
    """The file of a tokenizer.json's description and the roles that are told beside it."""
    try:
        ids = _ids(description)
        added = description.setdefault("added_tokens", [])
        controls = {token["content"]: token for token in added}
        names = _roles(told, ids)
        for name in names.values():
            if name not in controls:
                controls[name] = {"id": ids[name], "content": name, **PLAIN}
                added.append(controls[name])
            controls[name]["special"] = True
        added.sort(key=lambda token: token["id"])
        if ids.get(names.get("unk", "")) in (ids.get(names.get(role, "")) for role in ("bos", "eos")):
            del names["unk"]  # GPT-2 calls its document end so too, and needs none
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer of Hugging Face's `tokenizers`: {error!r:.100}") from error
    if not {"eos", "sep"} & names.keys():
        raise UserError(
            f"{path} has no control symbol that ends a document: name one as eos_token in tokenizer_config.json "
            "beside it."
        )
    names.setdefault("eos", names.get("sep", ""))
    description["special"] = by_role((role, ids[name]) for role, name in names.items())
    return _dumped(description, path)


PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _dumped(description: Json, path: Path) -> bytes:
    try:
        return json.dumps(description, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except ValueError as error:  # half of a surrogate pair, or no number
        raise UserError(f"{path} is not a tokenizer: {error!s:.100}") from error


def _ids(description: Json) -> dict[str, int]:
    """Ids of the model's pieces and of those added to it."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model's: piece and score
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in description.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _roles(told: Json, ids: dict[str, int]) -> dict[str, str]:
    """The symbol of each role that the vocabulary has: as the configuration tells, or a usual one where it tells none."""
    names: dict[str, str] = {}
    for role in ROLES:
        value = told.get(f"{role}_token", "")
        symbol = value.get("content") if isinstance(value, dict) else value
        candidates = USUAL[role] if symbol == "" else (symbol,)
        held = [name for name in candidates if name in ids]
        if held:
            names[role] = held[0]
    return names
