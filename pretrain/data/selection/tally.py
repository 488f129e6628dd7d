"""What a selection did, in numbers that are added up over pieces: whatever the pieces, processes and their order, the sum is the
same. Examples and the largest clusters are those with the smallest hash, or the largest size, of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.selection.rules import BINS
from pretrain.data.selection.select import Verdict

EXAMPLES = 5  # of each reason
BEGINNING = 280  # characters of a document that an example shows
DETAIL = 400  # of why it was dropped
LARGEST = 20  # clusters
COUNTS = ("read", "kept", "changed", "bytes_read", "bytes_kept")


class Example(NamedTuple):
    """A document: by its hash it was drawn."""

    hash: str
    name: str
    beginning: str
    detail: str


class Cluster(NamedTuple):
    """Copies, by the document that stands for them."""

    size: int
    name: str
    beginning: str


@dataclass
class Tally:
    """Documents and bytes of UTF-8: read = kept + dropped. changed: kept, but not as they were read. dropped: documents and
    bytes by reason. histograms: (rules, BINS) counts of the selection's rules, in their order."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    largest: list[Cluster] = field(default_factory=list)
    histograms: list[list[int]] = field(default_factory=list)

    def count(self, names: Sequence[str], texts: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        """Documents by their names, the texts as they were read, and what became of them."""
        for name, text, verdict in zip(names, texts, verdicts, strict=True):
            size = len(text.encode("utf-8", "surrogatepass"))
            self.read += 1
            self.bytes_read += size
            if verdict.text is None:
                self._drop(name, text, size, verdict)
            else:
                self.kept += 1
                self.changed += verdict.changed
                kept = text if not verdict.changed else verdict.text
                self.bytes_kept += size if kept is text else len(kept.encode("utf-8", "surrogatepass"))
            if verdict.copies > 1:
                self.largest.append(Cluster(verdict.copies, name, text[:BEGINNING]))
                self._trim()
        if verdicts:
            self._count_bins(np.stack([verdict.bins for verdict in verdicts]))

    def _drop(self, name: str, text: str, size: int, verdict: Verdict) -> None:
        counts = self.dropped.setdefault(verdict.reason, [0, 0])
        counts[0] += 1
        counts[1] += size
        beginning = text[:BEGINNING]
        drawn = hashlib.blake2b(f"{name}\0{beginning}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        examples = self.examples.setdefault(verdict.reason, [])
        if len(examples) < EXAMPLES or drawn < examples[-1].hash:
            examples.append(Example(drawn, name, beginning, verdict.detail[:DETAIL]))
            examples.sort()
            del examples[EXAMPLES:]

    def _count_bins(self, bins: Any) -> None:
        counts = [np.bincount(bins[bins[:, rule] >= 0, rule], minlength=BINS).tolist() for rule in range(bins.shape[1])]
        self.add_histograms(counts)

    def add_histograms(self, counts: Sequence[Sequence[int]]) -> None:
        """Of documents that were signed: `Summary.histograms`."""
        if not self.histograms:
            self.histograms = [list(row) for row in counts]
        elif counts:
            pairs = zip(self.histograms, counts, strict=True)
            self.histograms = [[a + b for a, b in zip(one, other, strict=True)] for one, other in pairs]

    def _trim(self) -> None:
        self.largest.sort(key=lambda cluster: (-cluster.size, cluster.name, cluster.beginning))
        del self.largest[LARGEST:]

    def add(self, other: Tally) -> None:
        """Count what another has counted too."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, (documents, size) in other.dropped.items():
            counts = self.dropped.setdefault(reason, [0, 0])
            counts[0] += documents
            counts[1] += size
        for reason, examples in other.examples.items():
            self.examples[reason] = sorted([*self.examples.get(reason, []), *examples])[:EXAMPLES]
        self.largest += other.largest
        self._trim()
        self.add_histograms(other.histograms)

    def to_json(self) -> dict[str, Any]:
        """A value that `from_json` takes; equal tallies give equal ones."""
        values = {name: getattr(self, name) for name in COUNTS}
        return {
            **values,
            "dropped": {reason: self.dropped[reason] for reason in sorted(self.dropped)},
            "examples": {reason: [list(one) for one in self.examples[reason]] for reason in sorted(self.examples)},
            "largest": [list(cluster) for cluster in self.largest],
            "histograms": self.histograms,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        return cls(
            **{name: values[name] for name in COUNTS},
            dropped={reason: list(counts) for reason, counts in values["dropped"].items()},
            examples={reason: [Example(*one) for one in found] for reason, found in values["examples"].items()},
            largest=[Cluster(*one) for one in values["largest"]],
            histograms=[list(row) for row in values["histograms"]],
        )
