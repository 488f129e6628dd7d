"""What a run says of itself: terminal, metrics.jsonl and TensorBoard, on rank 0; silence on the others."""

from __future__ import annotations
