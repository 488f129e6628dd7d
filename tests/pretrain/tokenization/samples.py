"""Texts, and tokenizers of each kind made from them by the libraries themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from tests.pretrain.data.corpus import ODD, stdlib_texts

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "1234567890", "birds", "sing", "def"]
WORDS += ["return", "self", "import", "class"]
TEXTS = [
    f"{WORDS[n % 17]}_{WORDS[n * 7 % 17]}({n}):\n\tif {WORDS[n * 3 % 17]} == '{n * n}':\n        return\r\n" * 2
    + " ".join(WORDS[(n * k) % 17] for k in range(20))
    for n in range(120)
]
WORDPIECES = 250  # words, and as many ends of words
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=200)


# -- tokenizers of Hugging Face's library --------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Lines of real sources and of other scripts."""
    return [*(line for text in stdlib_texts(30) for line in text.splitlines()), *ODD]


def write_wordpiece(folder: Path, lower: bool, config: bool = True) -> Path:
    """A folder with BERT's vocab.txt: characters, the most frequent words and ends of words.

    Counted here, because the library's trainer breaks ties by the order of a hash table, another at every call.
    """
    basic = BertWordPieceTokenizer(lowercase=lower)
    normalize, split = basic.normalizer.normalize_str, basic.pre_tokenizer.pre_tokenize_str
    counted = Counter(word for line in corpus() for word, _ in split(normalize(line)))
    ends: Counter[str] = Counter()
    for word, count in counted.items():
        ends.update({f"##{word[-length:]}": count for length in (2, 3, 4) if length < len(word)})
    characters = sorted({character for word in counted for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    for found in (counted, ends):
        longer = [each for each in found if len(each.removeprefix("##")) > 1]
        pieces += sorted(longer, key=lambda each: (-found[each], each))[:WORDPIECES]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    return folder


def write_byte_level(folder: Path) -> Path:
    """A folder with GPT-2's vocab.json and merges.txt."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus(), vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir()
    trained.save_model(str(folder))
    return folder


def write_metaspace(folder: Path) -> Path:
    """A folder with a tokenizer.json like Llama's: BPE over characters, a space before the text, bytes for what is rare."""
    tokenizer = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bare = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(bare)
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=symbols, limit_alphabet=80, show_progress=False)
    tokenizer.train_from_iterator((word for line in corpus() for word in line.split(" ")), trainer)
    folder.mkdir()
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:3]  # bytes are the model's own
    (folder / "tokenizer.json").write_text(json.dumps(description))
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "uncased": lambda folder: write_wordpiece(folder, lower=True),
    "cased": lambda folder: write_wordpiece(folder, lower=False),
    "byte-level": write_byte_level,
    "metaspace": write_metaspace,
}
