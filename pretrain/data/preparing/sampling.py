"""The text that a tokenizer is trained on: drawn from each piece by itself, then from these samples.

The same as one `Sample` of all training documents, in any order. A piece keeps only what can be of use: text whose hash is
below a bound, chosen so that about four times the wanted size remains. Where less than the wanted size came of it, as
of compressed or repeated text it may, all is drawn again below a higher bound.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from pretrain.data.documents import Skipped
from pretrain.data.preparing.files import read_json, write_json
from pretrain.data.preparing.options import PARTS, VOCAB_SIZE, Options, check_split
from pretrain.data.preparing.selecting import kept_of
from pretrain.data.preparing.tools import SAMPLE, Beat, Job, Tools, keep_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import Sample, VocabularyTooLarge, train_tokenizer

MARGIN = 4  # times the wanted size
BOUND = "sample.bound"

Say = Callable[[str], None]


def sample_piece(tools: Tools, number: int, beat: Beat) -> None:
    """Draw from one piece."""
    options, piece = tools.options, tools.plan.piece(number)
    drawn = Sample(options.max_train_bytes, options.seed, _bound(tools))
    skipped, documents = Skipped(), dict.fromkeys(PARTS, 0)
    for kept in kept_of(tools, piece, skipped):
        for document, part in zip(kept.documents, kept.parts, strict=True):
            documents[part] += 1
            if part == "train":
                drawn.add(document.text)
        beat(kept.read, 0)
    piece.check()
    result = {"documents": documents, "skipped": skipped.counts, "examples": skipped.examples}
    result |= {"pieces": drawn.pieces, "shed": drawn.shed, "passed_over": drawn.passed_over}
    tools.finish(Job(SAMPLE, number), result)


def train(tools: Tools, run: Callable[[str], None], say: Say) -> None:
    """Train the plan's tokenizer. run: does a stage for all pieces."""
    keep_tokenizer(tools.work, train_on(_drawn(tools, run), tools.options, say))
    shutil.rmtree(tools.work / SAMPLE)


def train_on(drawn: Sequence[str], options: Options, say: Say) -> Tokenizer:
    """A tokenizer as the options want it; where they name no size, as large as the text supports."""
    arguments = (options.model_type, options.user_symbols, None, options.max_train_bytes, options.seed)
    if options.vocab_size is not None:
        return train_tokenizer(drawn, options.vocab_size, *arguments)
    try:
        return train_tokenizer(drawn, VOCAB_SIZE, *arguments)
    except VocabularyTooLarge as error:
        say(f"The text is small: its vocabulary is {error.largest} in place of {VOCAB_SIZE}")
        return train_tokenizer(drawn, error.largest, *arguments)


def _drawn(tools: Tools, run: Callable[[str], None]) -> list[str]:
    """The sample of the whole. Raises UserError if a part of the split has no documents."""
    while True:
        run(SAMPLE)
        whole, passed_over = Sample(tools.options.max_train_bytes, tools.options.seed), False
        skipped, documents = Skipped(tools.options.strict), dict.fromkeys(PARTS, 0)
        for number in range(tools.plan.pieces):
            found = tools.result(Job(SAMPLE, number))
            whole.merge(found["pieces"], found["shed"])
            passed_over |= found["passed_over"]
            for name in PARTS:
                documents[name] += found["documents"][name]
            skipped.merge(found["skipped"], found["examples"])
        check_split(documents, skipped, tools.options)
        if not passed_over or whole.shed < 2**64:
            return whole.pieces
        write_json(tools.work / BOUND, min(_bound(tools) * 8, 2**64))
        shutil.rmtree(tools.work / SAMPLE)
        (tools.work / SAMPLE).mkdir()


def _bound(tools: Tools) -> int:
    """Text whose hash is not below this is not looked at."""
    if (raised := read_json(tools.work / BOUND)) is not None:
        return int(raised)
    share = MARGIN * tools.options.max_train_bytes / max(tools.plan.bytes, 1)
    return 2**64 if share >= 1 else int(2**64 * share)
