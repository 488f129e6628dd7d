"""How fast a run trains between two logged steps: tokens a second, seconds a step, and of these waiting for data."""

from __future__ import annotations

import time


class Rates:
    """Time, tokens (or examples), FLOPs and waiting of the steps since the last report."""

    def __init__(self, unit: str) -> None:
        self.warm, self.unit = False, unit
        self.started = self.clear()

    def clear(self) -> float:
        self.seconds, self.steps, self.tokens, self.waited = 0.0, 0, 0, 0.0
        self.flops = {"mfu": 0.0, "hfu": 0.0}
        self.started = time.perf_counter()
        return self.started

    def add(self, tokens: int, waited: float, flops: dict[str, float]) -> None:
        """flops: of a token, as the two utilizations count them."""
        now = time.perf_counter()
        if self.warm:
            self.seconds += now - self.started
            self.steps, self.tokens, self.waited = self.steps + 1, self.tokens + tokens, self.waited + waited
            self.flops = {name: sum + tokens * flops[name] for name, sum in self.flops.items()}
        self.started, self.warm = now, True

    def fields(self) -> dict[str, float]:
        if not self.steps:
            return {}
        return {
            f"{self.unit}_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            "data_seconds": self.waited / self.steps,
        }
