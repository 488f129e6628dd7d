"""Accuracy, F1 and Matthews' correlation from a table of counts, which adds up over batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """`table`: (C, C) int64, how often gold class (row) was predicted as class (column). Sum states with +."""

    table: Array

    @classmethod
    def none(cls, num_classes: int) -> ClassCounts:
        """The state before any example."""
        return cls(np.zeros((num_classes, num_classes), np.int64))

    @classmethod
    def of(cls, gold: Sequence[int] | Array, predicted: Sequence[int] | Array, num_classes: int) -> ClassCounts:
        """Counts of (N,) gold and predicted class numbers, all from 0 to num_classes - 1."""
        rows, columns = np.asarray(gold, np.int64), np.asarray(predicted, np.int64)
        if rows.shape != columns.shape or rows.ndim != 1:
            raise ValueError(f"{rows.shape} gold classes and {columns.shape} predictions")
        if rows.size and (min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= num_classes):
            raise ValueError(f"classes must be from 0 to {num_classes - 1}")
        counts = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
        return cls(counts.reshape(num_classes, num_classes))

    def __add__(self, other: ClassCounts) -> ClassCounts:
        return ClassCounts(self.table + other.table)

    @property
    def total(self) -> int:
        """Examples counted."""
        return int(self.table.sum())

    @property
    def accuracy(self) -> float:
        """Share of right predictions; NaN without examples."""
        return int(np.trace(self.table)) / self.total if self.total else math.nan

    def f1_by_class(self) -> Array:
        """(C,) F1 of each class, 0 where it was never gold nor predicted."""
        right = np.diag(self.table)
        both = self.table.sum(0) + self.table.sum(1)
        return np.divide(2 * right, both, out=np.zeros(len(right)), where=both > 0)

    def f1(self, positive: int = 1) -> float:
        """F1 of one class: of two, the second, as MRPC and QQP report it."""
        return float(self.f1_by_class()[positive])

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur in gold or predictions; NaN without examples."""
        occurs = (self.table.sum(0) + self.table.sum(1)) > 0
        return float(self.f1_by_class()[occurs].mean()) if occurs.any() else math.nan

    @property
    def matthews(self) -> float:
        """Matthews' correlation, for several classes Gorodkin's R_K (2004); 0 where either side has one class only."""
        gold, predicted = ([int(n) for n in self.table.sum(axis)] for axis in (1, 0))  # products outgrow int64
        total, right = self.total, int(np.trace(self.table))
        covariance = right * total - sum(g * p for g, p in zip(gold, predicted, strict=True))
        spread = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(g * g for g in gold))
        return covariance / math.sqrt(spread) if spread else 0.0
