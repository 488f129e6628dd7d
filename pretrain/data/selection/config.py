"""What a selection file says: which documents of a corpus are kept. A section that is left out is off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from parallel.layout import Problem
from pretrain.config.section import Section, meaning

Share = float | None
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def share(default: float, words: str) -> Any:
    """A threshold from 0 to 1; null turns its rule off."""
    return meaning(default, words, ge=0, le=1)


class Exact(Section):
    """Of documents that are the same the first is kept."""

    compare: Literal["normalized", "bytes"] = meaning(
        "normalized", "same but for case, white space and composed accents (NFC); or the same bytes"
    )


class Near(Section):
    """Of documents that share most of their shingles the first is kept (MinHash: Broder 1997; bands: Leskovec et al. 2014,
    3.4)."""

    threshold: float = meaning(0.75, "estimated Jaccard similarity from which two are copies", gt=0, le=1)
    permutations: int = meaning(
        128, "values of a signature; the estimate's error is about 0.5 / their root", ge=16, le=1024
    )
    bands: int = meaning(16, "of permutations / bands values each: two that agree in a whole band are compared", ge=1)
    shingle: Literal["words", "characters"] = meaning(
        "words", "words (runs of letters and digits), or characters, for languages without spaces"
    )
    size: int = meaning(5, "words or characters a shingle", ge=1, le=64)
    drop: bool = meaning(True, "drop the copies; false: keep them, all on one side of the split")

    def problems(self) -> Iterator[Problem]:
        if self.permutations % self.bands:
            message = f"{self.bands} do not divide near.permutations {self.permutations}"
            yield Problem("bands", message, "give a divisor, such as 16 of 128")


class Length(Section):
    """Documents of at least and at most so many words (divided by white space) and characters."""

    min_words: int | None = meaning(None, "words at least", ge=0)
    max_words: int | None = meaning(None, "words at most", ge=1)
    min_characters: int | None = meaning(None, "characters at least", ge=0)
    max_characters: int | None = meaning(None, "characters at most", ge=1)

    def problems(self) -> Iterator[Problem]:
        for unit in ("words", "characters"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                yield Problem(f"min_{unit}", f"{least} is above max_{unit} {most}", "keep nothing is no selection")


class Language(Section):
    """Documents in these languages, as py3langid's model sees them (Lui and Baldwin 2012)."""

    keep: list[str] = meaning(..., "codes of the languages wanted (ISO 639-1), such as [en, de]")
    least: float = meaning(0.65, "probability of that language at least (Penedo et al. 2024: 0.65)", ge=0, le=1)
    characters: int = meaning(2048, "of a document's beginning that are looked at", ge=64)

    def problems(self) -> Iterator[Problem]:
        if not self.keep:
            yield Problem("keep", "is empty", "name at least one language, such as [en]")


class GopherRepetition(Section):
    """Too much of a document repeats itself (Rae et al. 2021, table A1). A line, paragraph or n-gram counts from its second
    time on; the most frequent n-gram with all its times."""

    duplicate_lines: Share = share(0.30, "share of lines that were there before, at most")
    duplicate_paragraphs: Share = share(0.30, "share of paragraphs that were there before, at most")
    duplicate_line_characters: Share = share(0.20, "share of characters in such lines, at most")
    duplicate_paragraph_characters: Share = share(0.20, "share of characters in such paragraphs, at most")
    top_2_gram: Share = share(0.20, "share of words' characters in the most frequent two words, at most")
    top_3_gram: Share = share(0.18, "the same of three words")
    top_4_gram: Share = share(0.16, "the same of four words")
    duplicate_5_grams: Share = share(0.15, "share of words' characters in five words that were there before, at most")
    duplicate_6_grams: Share = share(0.14, "the same of six words")
    duplicate_7_grams: Share = share(0.13, "the same of seven words")
    duplicate_8_grams: Share = share(0.12, "the same of eight words")
    duplicate_9_grams: Share = share(0.11, "the same of nine words")
    duplicate_10_grams: Share = share(0.10, "the same of ten words")


class GopherQuality(Section):
    """A document that does not look like text (Rae et al. 2021, A1.1). Words are divided by white space."""

    min_words: int | None = meaning(50, "words at least", ge=0)
    max_words: int | None = meaning(100_000, "words at most", ge=1)
    min_word_length: float | None = meaning(3.0, "mean characters a word at least", ge=0)
    max_word_length: float | None = meaning(10.0, "mean characters a word at most", ge=0)
    max_hashes: float | None = meaning(0.1, "signs # a word at most", ge=0)
    max_ellipses: float | None = meaning(0.1, "ellipses (... or the one sign) a word at most", ge=0)
    max_bullet_lines: Share = share(0.9, "share of lines that begin with a bullet, at most")
    max_ellipsis_lines: Share = share(0.3, "share of lines that end with an ellipsis, at most")
    min_alphabetic_words: Share = share(0.8, "share of words with a letter, at least")
    min_stop_words: int | None = meaning(2, "different stop words at least", ge=0)
    stop_words: list[str] = meaning(list(STOP_WORDS), "the stop words")

    def problems(self) -> Iterator[Problem]:
        if self.min_stop_words is not None and self.min_stop_words > len(set(self.stop_words)):
            message = f"{self.min_stop_words} of {len(set(self.stop_words))} stop words"
            yield Problem("min_stop_words", message, "give more stop_words, or null")
        for word in self.stop_words:
            if word.split() != [word]:
                yield Problem("stop_words", f"{word!r} is not one word", "give words without spaces")


class C4(Section):
    """Lines that are no sentences go, then pages (Raffel et al. 2020, 2.2, and their published code)."""

    end_marks: str | None = meaning('.!?"\u201d', "lines must end with one of these signs; null: with any")
    min_line_words: int | None = meaning(5, "words a line at least, or the line goes (once 3)", ge=0)
    max_line_word: int | None = meaning(1000, "characters of a line's longest word at most, or the line goes", ge=1)
    javascript: bool = meaning(True, "lines with the word javascript go")
    policies: bool = meaning(True, "lines that tell of cookies, terms of use or a privacy policy go")
    citations: bool = meaning(True, "marks such as [1], [edit] and [citation needed] go")
    lorem_ipsum: bool = meaning(True, "pages with lorem ipsum go")
    curly_brackets: bool = meaning(True, "pages with a { go")
    listed_words: str | None = meaning(None, "file of words and phrases, one a line: pages with any of them go")
    min_sentences: int | None = meaning(3, "sentences that are left at least, or the page goes (once 5)", ge=0)

    def problems(self) -> Iterator[Problem]:
        if self.end_marks == "":
            yield Problem("end_marks", "is empty: no line would be left", "give signs such as .!?, or null")


class Quality(Section):
    """What one of our own fine-tuned classification runs says of the document."""

    run: str = meaning(..., "folder of a classification run of one text")
    label: str = meaning(..., "the label that good documents have")
    least: float = meaning(0.5, "probability of that label at least", ge=0, le=1)
    batch_size: int = meaning(32, "documents at once", ge=1)


class Contamination(Section):
    """Documents that hold a run of words of an evaluation file go (Brown et al. 2020, appendix C)."""

    files: list[str] = meaning(..., "evaluation files: text, .jsonl (all their texts), .tsv or .csv (all their cells)")
    words: int = meaning(13, "words that agree in a row: letters and digits alone, whatever the case", ge=1, le=64)

    def problems(self) -> Iterator[Problem]:
        if not self.files:
            yield Problem("files", "is empty", "name at least one file of evaluation texts")


class SelectionConfig(Section):
    """Which documents `prepare` keeps. In this order: normalize, exact, rules, near, quality and contamination."""

    version: Literal[1] = meaning(..., "of this file's form: 1")
    normalize: Literal["none", "nfc", "nfkc"] = meaning(
        "none", "Unicode form that texts are brought to before all else, and are encoded in"
    )
    exact: Exact | None = meaning(None, "exact duplicates")
    length: Length | None = meaning(None, "words and characters of a document")
    language: Language | None = meaning(None, "languages wanted")
    gopher_repetition: GopherRepetition | None = meaning(None, "Gopher's rules on repetition")
    gopher_quality: GopherQuality | None = meaning(None, "Gopher's rules on quality")
    c4: C4 | None = meaning(None, "C4's rules on lines and pages")
    near: Near | None = meaning(None, "near duplicates")
    quality: Quality | None = meaning(None, "a classifier's opinion")
    contamination: Contamination | None = meaning(None, "evaluation texts in the corpus")

    def problems(self) -> Iterator[Problem]:
        if not any(getattr(self, name) is not None for name in type(self).model_fields if name not in PLAIN):
            yield Problem(
                "exact", "nothing is selected: each section is left out", "give at least one, such as exact: {}"
            )

    @property
    def files(self) -> list[Path]:
        """Those whose contents decide too."""
        listed = [self.c4.listed_words] if self.c4 and self.c4.listed_words else []
        return [Path(name) for name in [*listed, *(self.contamination.files if self.contamination else [])]]


PLAIN = ("version", "normalize")  # fields that are no sections
