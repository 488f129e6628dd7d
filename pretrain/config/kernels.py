"""Whose kernels compute: the same numbers by other code, within rounding."""

from __future__ import annotations

from typing import Literal

from pretrain.config.section import Section, meaning


class KernelsConfig(Section):
    """Backends of the kernels; auto takes the best of those that can, by a table, and what it took is told at the start."""

    attention: Literal["auto", "triton", "cudnn", "flash", "varlen", "torch"] = meaning(
        "auto",
        "triton (this project's), cudnn, flash (FlashAttention), varlen (it, over documents and windows), torch or auto",
    )
    loss: Literal["auto", "triton", "torch"] = meaning(
        "auto", "of the output layer's cross-entropy: triton, torch or auto"
    )
    norm: Literal["auto", "triton", "torch"] = meaning(
        "auto", "of the norms, with the residual sum and its dropout before them: triton, torch or auto (torch)"
    )
    rotary: Literal["auto", "triton", "torch"] = meaning("auto", "of rotary positions: triton, torch or auto (torch)")
    activation: Literal["auto", "triton", "torch"] = meaning(
        "auto", "of the feed-forward layers' activation with the bias before it: triton, torch or auto (torch)"
    )
    optimizer: Literal["auto", "triton", "torch"] = meaning("auto", "of AdamW's step: triton, torch or auto")
