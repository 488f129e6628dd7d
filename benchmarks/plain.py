"""The yardstick: a GPT and its training loop in plain PyTorch, written the way nanoGPT writes them.

Fused qkv, scaled_dot_product_attention, no biases, tied embedding, AdamW in two groups, clipping, random places of a
memory-mapped token file. Faster than nanoGPT on a CPU in one thing: AdamW is fused there too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    hidden: int = 384
    heads: int = 6
    tokens: int = 256  # a sequence
    batch: int = 16  # sequences a step
    vocabulary: int = 8192


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.c_attn = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.c_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, H = x.shape
        q, k, v = (y.view(B, S, self.heads, H // self.heads).transpose(1, 2) for y in self.c_attn(x).split(H, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, S, H))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.hidden, bias=False)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.hidden, bias=False)
        self.c_fc = nn.Linear(shape.hidden, 4 * shape.hidden, bias=False)
        self.c_proj = nn.Linear(4 * shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocabulary, shape.hidden)
        self.wpe = nn.Embedding(shape.tokens, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.hidden, bias=False)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 1 / math.sqrt(2 * shape.layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets (B, S) -> the mean loss."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def batches(file: Path, shape: Shape) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        data = np.memmap(file, dtype=np.uint16, mode="r")  # anew each batch, as nanoGPT does against a leak
        starts = torch.randint(len(data) - shape.tokens, (shape.batch,), generator=generator).tolist()
        rows = np.stack([data[i : i + shape.tokens + 1].astype(np.int64) for i in starts])
        yield torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def steps(file: Path, shape: Shape, bf16: bool, compiled: bool) -> Iterator[float | None]:
    """Train for ever; the loss of every tenth step."""
    torch.manual_seed(1)
    model = GPT(shape)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model
    context = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    for step, (ids, targets) in enumerate(batches(file, shape)):
        with context:
            loss = forward(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item() if step % 10 == 0 else None
