"""Which documents of a corpus `prepare` keeps, by a selection file.

    normalize -> exact duplicates -> rules -> near duplicates -> quality -> contamination

A document that is dropped has one reason, the first in this order. `judge` alone says what becomes of texts, where no
duplicates are to be found. Where they are (`needs_clusters`), each piece of the corpus is signed first (exact hash, rules,
MinHash signature), `clusters.cluster` finds the copies of all pieces together, and `judge` takes the fates that it writes.

All but the copies is a function of the text alone. The rules look at a document's first WINDOW characters, so that memory is
bounded whatever a document's length; lines are taken out of the whole text, and contamination is looked for in all of it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.config.load import load_section
from pretrain.data.manifest import canonical
from pretrain.data.selection import c4, language, quality, repetition
from pretrain.data.selection.classifier import Classifier
from pretrain.data.selection.config import SelectionConfig
from pretrain.data.selection.contamination import Runs
from pretrain.data.selection.fates import Fates
from pretrain.data.selection.minhash import signatures
from pretrain.data.selection.reasons import CONTAMINATION, EXACT, FIRST_RULE, KEPT, NAMES, NEAR, QUALITY
from pretrain.data.selection.rules import BINS, Array, Group, Rule
from pretrain.data.selection.signatures import Signatures
from pretrain.data.selection.words import Texts
from pretrain.errors import UserError

VERSION = 1  # of what is computed: in the fingerprint
WINDOW = 1 << 22  # characters of a document that rules and signatures look at
TOGETHER = 1 << 18  # characters of texts that are measured at once


class Verdict(NamedTuple):
    """What becomes of a document. text: as it is kept, None where it is dropped; reason and detail: why, in words. mark: 16
    bytes by whose hash its part of the split is chosen. bins: what it adds to the histograms, a bin or -1 for each rule. copies:
    documents of its cluster, itself included, where it stands for them."""

    text: str | None
    reason: str
    detail: str
    mark: bytes
    changed: bool
    bins: Array
    copies: int


class Examined(NamedTuple):
    """D texts by the rules. texts: as lines were taken out; reasons (D,): of reasons.py; values (D, rules): NaN where a rule
    did not look."""

    texts: list[str]
    reasons: Array
    values: Array


class Selection:
    """A selection file, opened: all files that it names are read. Raises UserError for what is wrong with any of them."""

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config
        self.groups = _groups(config)
        self.rules: list[Rule] = [rule for group in self.groups for rule in group.rules]
        self.classifier = Classifier(config.quality) if config.quality else None
        if self.classifier:
            self.rules.append(self.classifier.rule)
        self.runs = Runs(config.contamination) if config.contamination else None
        self.fingerprint = self._fingerprint()

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Of a YAML file."""
        try:
            return cls(load_section(path, SelectionConfig))
        except OSError as error:
            raise UserError(f"{path}: names a file that cannot be read: {error}") from None

    @property
    def needs_clusters(self) -> bool:
        """Whether documents are to be signed and clustered before they are judged."""
        return self.config.exact is not None or self.config.near is not None

    @property
    def reasons(self) -> list[str]:
        """All reasons, in their order."""
        rules = [self.reason(FIRST_RULE + place) for place in range(self._num_text_rules)]
        return [NAMES[EXACT], *dict.fromkeys(rules), NAMES[NEAR], NAMES[QUALITY], NAMES[CONTAMINATION]]

    def reason(self, number: int) -> str:
        """In words."""
        return NAMES[number] if number < FIRST_RULE else self.rules[number - FIRST_RULE].name

    def sign(self, texts: Sequence[str]) -> Signatures:
        """Of documents, in their order; `SignatureWriter` takes it."""
        texts = [self._normal(text) for text in texts]
        exact = np.array([self._exact(text) for text in texts], "<u8").reshape(-1, 2)
        examined = self._examine(texts)
        chosen = np.maximum(examined.reasons.astype(np.int64) - FIRST_RULE, 0)
        values = np.zeros(len(texts))
        if self.rules:
            values = np.where(examined.reasons >= FIRST_RULE, examined.values[np.arange(len(texts)), chosen], 0.0)
        histograms = np.zeros((len(self.rules), BINS), np.int64)
        bins = self._bins(examined.values)
        for place in range(len(self.rules)):
            histograms[place] = np.bincount(bins[bins[:, place] >= 0, place], minlength=BINS)
        return Signatures(exact, examined.reasons, values, self._sketches(examined), histograms)

    def judge(self, texts: Sequence[str], fates: Fates | None = None) -> list[Verdict]:
        """Of documents, in their order. fates: of these documents, where they were signed and clustered."""
        before = texts
        texts = [self._normal(text) for text in texts]
        if fates is None:
            examined = self._examine(texts)
            marks = [self._exact(text).tobytes() for text in texts]
        else:
            if len(fates) != len(texts):
                raise ValueError(f"{len(texts)} texts with fates of {len(fates)}")
            examined, marks = self._fated(texts, fates), [mark.tobytes() for mark in fates.rows["mark"]]
        details = [self._detail(place, examined, fates) for place in range(len(texts))]
        if self.classifier is not None:
            self._ask(examined, details)
        if self.runs is not None:
            self._look_for_runs(examined, details)
        bins = self._bins(examined.values)
        copies = self._copies(fates) if fates is not None else np.ones(len(texts), np.int64)
        return [
            Verdict(
                None if reason else text,
                self.reason(int(reason)) if reason else "",
                details[place],
                marks[place],
                not reason and text != before[place],
                bins[place],
                int(copies[place]),
            )
            for place, (text, reason) in enumerate(zip(examined.texts, examined.reasons, strict=True))
        ]

    # -- parts --------------------------------------------------------------------------------------------------------

    def _normal(self, text: str) -> str:
        form = self.config.normalize
        return text if form == "none" else unicodedata.normalize(form.upper(), text)  # type: ignore[arg-type]

    def _exact(self, text: str) -> Array:
        if self.config.exact is not None and self.config.exact.compare == "normalized":
            text = " ".join(unicodedata.normalize("NFC", text).lower().split())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return np.frombuffer(digest, "<u8")

    @property
    def _num_text_rules(self) -> int:
        return len(self.rules) - (self.classifier is not None)

    def _examine(self, texts: Sequence[str]) -> Examined:
        found = Examined(list(texts), np.zeros(len(texts), np.uint8), np.full((len(texts), len(self.rules)), np.nan))
        for places in _together(texts):
            self._examine_some(found, np.array(places))
        return found

    def _examine_some(self, found: Examined, alive: Array) -> None:
        """Group after group on the texts at these places that are still kept; writes into `found`."""
        windows, first, texts = [found.texts[place][:WINDOW] for place in alive], 0, None
        for group in self.groups:
            if group.change is not None:
                for place in alive:
                    found.texts[place] = group.change(found.texts[place])
                windows, texts = [found.texts[place][:WINDOW] for place in alive], None
            texts = texts or Texts(windows)
            values = group.measure(windows, texts)
            found.values[alive, first : first + len(group.rules)] = values
            broken = np.zeros(len(alive), np.uint8)
            for place, rule in reversed(list(enumerate(group.rules))):
                broken[rule.broken(values[:, place])] = FIRST_RULE + first + place
            first += len(group.rules)
            if broken.any():
                found.reasons[alive] = broken
                alive, windows, texts = (
                    alive[broken == 0],
                    [w for w, b in zip(windows, broken, strict=True) if not b],
                    None,
                )
            if not len(alive):
                return

    def _sketches(self, examined: Examined) -> Array:
        """(D, P); zeros where a rule drops the text, which takes no part."""
        near = self.config.near
        sketches = np.zeros((len(examined.texts), near.permutations if near else 0), np.uint32)
        kept = np.flatnonzero(examined.reasons == KEPT)
        texts = [examined.texts[place] for place in kept]
        for places in _together(texts) if near else ():
            windows = [unicodedata.normalize("NFC", texts[place][:WINDOW]) for place in places]
            sketches[kept[places]] = signatures(Texts(windows), near.shingle, near.size, near.permutations)  # type: ignore[union-attr]
        return sketches

    def _bins(self, values: Array) -> Array:
        """(D, rules) bins of what was measured, -1 where nothing was, or nothing is drawn."""
        found = np.full(values.shape, -1, np.int16)
        for place, rule in enumerate(self.rules):
            measured = ~np.isnan(values[:, place])
            if rule.scale is not None and measured.any():
                found[measured, place] = rule.scale.bins(values[measured, place])
        return found

    def _fated(self, texts: list[str], fates: Fates) -> Examined:
        """As signing found them: only the lines are taken out again."""
        reasons = np.array(fates.rows["reason"])
        for group in self.groups:
            if group.change is not None:
                texts = [text if reason else group.change(text) for text, reason in zip(texts, reasons, strict=True)]
        return Examined(list(texts), reasons, np.full((len(texts), len(self.rules)), np.nan))

    def _detail(self, place: int, examined: Examined, fates: Fates | None) -> str:
        reason = int(examined.reasons[place])
        if reason in (EXACT, NEAR):
            assert fates is not None
            row = fates.rows[place]
            return f"a copy of document {row['place'] + 1:,} of piece {row['piece'] + 1:,}"
        if reason < FIRST_RULE:
            return ""
        rule = self.rules[reason - FIRST_RULE]
        value = examined.values[place, reason - FIRST_RULE] if fates is None else fates.rows["value"][place]
        return rule.sentence(float(value))

    def _ask(self, examined: Examined, details: list[str]) -> None:
        assert self.classifier is not None
        kept, rule = np.flatnonzero(examined.reasons == KEPT), self.classifier.rule
        if not len(kept):
            return
        examined.values[kept, -1] = self.classifier([examined.texts[place] for place in kept])
        for place in kept[rule.broken(examined.values[kept, -1])]:
            examined.reasons[place] = QUALITY
            details[place] = rule.sentence(float(examined.values[place, -1]))

    def _look_for_runs(self, examined: Examined, details: list[str]) -> None:
        assert self.runs is not None
        for place in np.flatnonzero(examined.reasons == KEPT):
            if (found := self.runs.find(examined.texts[place])) is not None:
                examined.reasons[place] = CONTAMINATION
                details[place] = f"{self.runs.size} words of {found.file}: {found.words}"

    @staticmethod
    def _copies(fates: Fates) -> Array:
        """Of a cluster's first document that is kept; 1 of all others."""
        kept = fates.rows["reason"] == KEPT
        return np.where(kept, fates.rows["size"], 1)

    def _fingerprint(self) -> str:
        """Of all that decides."""
        found: dict[str, Any] = {"version": VERSION, "config": self.config.model_dump(mode="json")}
        found["files"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.config.files]
        found["quality"] = self.classifier.fingerprint if self.classifier else None
        return hashlib.sha256(canonical(found)).hexdigest()


def _groups(config: SelectionConfig) -> list[Group]:
    """The rules, in their order: the cheap ones first."""
    made: list[tuple[Any, Callable[[Any], Sequence[Group]]]] = [
        (config.length, lambda section: [quality.length_group(section)]),
        (config.gopher_quality, lambda section: [quality.gopher_group(section)]),
        (config.gopher_repetition, lambda section: [repetition.group(section)]),
        (config.language, lambda section: [language.group(section)]),
        (config.c4, c4.groups),
    ]
    groups = [group for section, make in made if section is not None for group in make(section)]
    return [group for group in groups if group.rules or group.change]


def _together(texts: Sequence[str]) -> Iterator[list[int]]:
    """Places of texts that are measured at once."""
    places: list[int] = []
    size = 0
    for place, text in enumerate(texts):
        places.append(place)
        size += min(len(text), WINDOW)
        if size >= TOGETHER:
            yield places
            places, size = [], 0
    if places:
        yield places
