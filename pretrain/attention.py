"""What each head looks at in one chosen sample, as an image a layer: `monitor.attention_every`.

The model runs as it does otherwise; the probabilities are computed beside it, plainly, from the queries and keys that its own
layers make and the options that they give to attention. So the maps say what the weights do, whatever kernel computes it.

Shapes: S positions, N heads, G key/value heads (N = G R), D head size. A map is (N, S, S): rows are queries, columns keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from kernels.documents import numbered
from parallel.layers import Parts
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.finetuning.sequences import Format
from pretrain.models.stack import Stack
from pretrain.objectives.choice import Objective
from pretrain.objectives.labelled import Labelled

TOKENS = 64  # of the sample that are shown at most
LAYERS = 4  # that are shown unless some are named, from the first to the last
CELL = 4  # pixels of one probability, each way, at least
GAP = 2  # pixels between two heads
MASKED = -math.inf
CHANGES = ("causal", "window", "slopes", "documents")  # options of attention that its probabilities depend on
KEEPS = ("backend", "dropout", "keys", "site", "first_head", "first_query")  # and, of whole sequences in `eval()`, not


Image = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width)


class Shown(NamedTuple):
    """The chosen sample (1, S): ids, documents (None: one), segments (None: the first); and the tokens as people read them."""

    inputs: Tensor
    documents: Tensor | None
    segments: Tensor | None
    tokens: list[str]


def chosen_sample(config: Config, sources: Sources, objective: Objective) -> Shown:
    """`monitor.sample_prompt`, or else the first of the held-out samples, as the model meets it in validation."""
    documents: Tensor | None = None
    segments: Tensor | None = None
    if config.monitor.sample_prompt:
        ids = torch.tensor(_prompt(config, sources))
    elif sources.examples is not None:
        row = sources.examples.samples[0].rows[0]
        ids, segments = torch.from_numpy(row.ids), torch.from_numpy(row.segments)
    else:
        assert sources.validation is not None and not isinstance(objective, Labelled)
        numbers = np.arange(1)
        read = torch.from_numpy(sources.validation.read(numbers, objective.also))
        batch = objective(torch.from_numpy(numbers), read)
        ids, segments = batch.inputs[0], getattr(batch, "segments", None)
        segments = None if segments is None else segments[0]
        documents = None if batch.documents is None else batch.documents[:, :TOKENS]
    ids = ids[:TOKENS]
    segments = None if segments is None else segments[None, :TOKENS]
    return Shown(ids[None], documents, segments, [_token(sources, index) for index in ids.tolist()])


def shown_layers(config: Config) -> list[int]:
    """Numbers of the layers whose maps are drawn."""
    if config.monitor.attention_layers is not None:
        return sorted(set(config.monitor.attention_layers))
    count = config.model.num_layers
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, LAYERS)).tolist()})


@torch.no_grad()
def attention_maps(model: Stack, sample: Shown, layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer: its map (N, S, S), float32 on the CPU. The model, in `eval()`, has all layers; its tensor ranks, which have a
    share of the heads each, all call this."""
    found: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    watched = [block.attention for name, block in model.layers() if int(name) in layers]
    try:
        for number, attention in zip(layers, watched, strict=True):
            attention.parts = _Watch(attention.parts, number, found)  # type: ignore[assignment]
        inputs, documents, segments = (None if x is None else x.to(device) for x in sample[:3])
        model.states(inputs, sample.inputs.shape[1], None, documents, segments)
    finally:
        for attention in watched:
            attention.parts = model.parts
    return {number: _all_heads(model.parts, found[number]).cpu() for number in layers}


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """(N, S, S) float32 of q (1, S, N, D) and k (1, S, G, D), options as `kernels.attention.attention` has them."""
    length, heads, size = q.shape[1:]
    keys = k[0].repeat_interleave(heads // k.shape[2], dim=1)
    scores = torch.einsum("snd,tnd->nst", q[0].float(), keys.float()) / math.sqrt(size)
    places = torch.arange(length, device=q.device)
    distance = places[:, None] - places[None, :]
    if slopes is not None:
        scores = scores - slopes.float()[:, None, None] * distance.abs()
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if documents is not None:
        queries, others = numbered(documents, None, 0, length)
        visible = visible & (queries[0, :, None] == others[0, None, :])
    return torch.where(visible, scores, MASKED).softmax(dim=-1)


def as_image(heads: Tensor) -> Image:
    """(height, width) uint8 of a map: the heads in rows, the first above on the left; the square root of a probability is its
    brightness, or a row over many keys would be black."""
    count, length, _ = heads.shape
    columns = math.ceil(math.sqrt(count))
    cell = max(CELL, 256 // length)
    pixels = (heads.sqrt() * 255).round().to(torch.uint8).numpy().repeat(cell, axis=1).repeat(cell, axis=2)
    side = length * cell + GAP
    rows = -(-count // columns)
    image = np.full((rows * side - GAP, columns * side - GAP), 128, np.uint8)
    for head, part in enumerate(pixels):
        top, left = head // columns * side, head % columns * side
        image[top : top + side - GAP, left : left + side - GAP] = part
    return image


class _Watch:
    """Parts whose attention also tells its probabilities."""

    def __init__(self, parts: Parts, layer: int, found: dict[int, Tensor]) -> None:
        self.parts, self.layer, self.found = parts, layer, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts, name)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options.keys() <= {*CHANGES, *KEEPS}, f"the maps know nothing of {sorted(options)}"
        self.found[self.layer] = probabilities(q, k, **{name: options[name] for name in CHANGES})
        return self.parts.attention(q, k, v, **options)


def _all_heads(parts: Parts, heads: Tensor) -> Tensor:
    """Of all tensor ranks."""
    if parts.axis.size == 1:
        return heads
    shares = [torch.empty_like(heads) for _ in range(parts.axis.size)]
    torch.distributed.all_gather(shares, heads.contiguous(), group=parts.axis.group)
    return torch.cat(shares)


def _prompt(config: Config, sources: Sources) -> list[int]:
    """As the model was trained to see a text; a decoder's has no end yet."""
    model = config.model
    form = Format(sources.tokenizer, sources.vocabulary, model.causal, config.data.seq_length, model.num_segments)
    ids = sources.tokenizer.encode(config.monitor.sample_prompt) or [sources.tokenizer.eos]
    return ids[: form.length] if model.causal else form.joined([ids]).ids.tolist()


def _token(sources: Sources, index: int) -> str:
    if index < sources.tokenizer.vocab_size:
        return sources.tokenizer.piece(index)
    return next((f"[{role.upper()}]" for role, place in sources.vocabulary.special.items() if place == index), "?")
