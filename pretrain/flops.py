"""Arithmetic of training, for the utilization of a device: MFU, of what the model needs, and HFU, of what is computed.

A product of a matrix's weight with a token is 2 FLOPs forward and 4 backward. Counted are the products with the weights
(query, key, value and output projections, the feed-forward layer, the head) and attention's two, q k^T and probabilities
times v, by the mask: a query multiplies only the keys that it sees, of a causal sequence of S tokens (S + 1) / 2 in the
mean, of a bidirectional one all S. Of a masked objective only the places that are predicted meet the head. Embeddings and
positions are look-ups and cost nothing.

Left out: biases, norms, activations, softmax, rotary positions, dropout, the loss and the optimizer, which take time but
few FLOPs; the vocabulary's padding; masked scores that a kernel computes and throws away, and scores that its backward
makes again (FlashAttention's), which depend on the kernel.

Upper bound: where documents are kept apart (`objective.attention_across_documents: false`) a sequence counts as one
document, since how many pairs they leave changes from sample to sample.

Beside other counts. Chowdhery et al. 2022 ("PaLM", appendix B) count 6 N + 12 L H Q S a token: every parameter but the
embedding, and the whole square of scores, twice what a causal mask leaves. So an MFU by their formula is higher, the more
so the longer the sequence is beside the width: theirs is 1.014 times ours for GPT-3 175B at 2,048 tokens (its layers all
dense), 1.072 times for GPT-2 small at 1,024.
"""

from __future__ import annotations

import re
from typing import Literal

import torch

from pretrain.config.model import GATED, ModelConfig
from pretrain.config.run import Config

FORWARD_AND_BACKWARD = 3  # the backward pass has two products for each of the forward pass: by weights, by activations

# Dense bfloat16 peaks without sparsity, TFLOP/s, from the makers' data sheets; the first that stands as whole words in the
# device's name counts (an RTX A4000 is no A40, a GB200 no B200).
PEAKS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 150.0,
    "RTX 6000 Ada": 364.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def flops_per_token(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    predicted: float = 1.0,
    lengths: tuple[int, int] | None = None,
) -> float:
    """What one token of training needs, forward and backward. predicted: share of the places that meet the head; lengths:
    of an encoder-decoder's source and target, of a sample of `seq_length` tokens."""
    head = model.hidden_size * (vocab_size + (model.hidden_size if model.kind == "bert" else 0))
    forward = 2 * (_products(model, seq_length, lengths) + head * predicted)
    return FORWARD_AND_BACKWARD * (forward + _scores(model, seq_length, lengths))


def hardware_flops_per_token(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    recompute: Literal["none", "selective", "full"],
    predicted: float = 1.0,
    lengths: tuple[int, int] | None = None,
) -> float:
    """The same with what recomputation makes again (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
    Transformer Models", section 5 and appendix A): `full` each block's forward pass, `selective` attention's products.

    torch's checkpoint does a little less: it stops when it has what the backward pass reads, so before a block's last
    product, or attention's where the two are no single operator."""
    again = 0.0
    if recompute != "none":
        again += _scores(model, seq_length, lengths)
    if recompute == "full":
        again += 2 * _products(model, seq_length, lengths)
    return flops_per_token(model, vocab_size, seq_length, predicted, lengths) + again


def visible_pairs(length: int, window: int | None, causal: bool = True) -> int:
    """(query, key) pairs that a mask leaves of `length` tokens, of which each sees the last `window` at most, and without
    `causal` as many to the other side."""
    if not causal:
        return 2 * visible_pairs(length, window) - length
    shown = min(window or length, length)
    return shown * (shown + 1) // 2 + (length - shown) * shown  # the first see fewer than the window


def _products(model: ModelConfig, seq_length: int, lengths: tuple[int, int] | None) -> float:
    """Products with the blocks' weights a token, forward, in multiplications."""
    matrices = (3 if model.activation in GATED else 2) * model.hidden_size * model.feed_forward_size
    queries = 2 * model.hidden_size * model.num_heads * model.size_of_head  # and the output's
    keys = 2 * model.hidden_size * model.kv_heads * model.size_of_head  # and values
    block = queries + keys + matrices
    if lengths is None:
        return model.num_layers * block
    source, target = lengths
    decoder = target * (block + queries) + source * keys  # which it makes of the encoder's states
    return (model.num_layers * source * block + model.layers_of_decoder * decoder) / seq_length


def _scores(model: ModelConfig, seq_length: int, lengths: tuple[int, int] | None) -> float:
    """FLOPs of attention's two products a token, forward: 2 x heads x head size each, for every visible key."""

    def pairs(layers: int, length: int, causal: bool) -> int:
        return sum(visible_pairs(length, model.window(layer), causal) for layer in range(layers))

    if lengths is None:
        seen = pairs(model.num_layers, seq_length, model.causal)
    else:
        (source, target), decoder = lengths, model.layers_of_decoder
        seen = pairs(model.num_layers, source, False) + pairs(decoder, target, True) + decoder * source * target
    return 4 * model.num_heads * model.size_of_head * seen / seq_length


def peak_flops(device: torch.device, compute: str, given_tflops: float | None) -> float | None:
    """FLOP/s of one device at its best, or None where that is not known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or compute != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop|Max-Q|D|Ti)\b", name):  # a part of the device, or a slower one of the same name
        return None
    return next((peak * 1e12 for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def needed_flops(config: Config, vocab_size: int) -> dict[str, float]:
    """Of a token of training: what the model needs, and what is computed."""
    length, objective = config.data.seq_length, config.objective
    shape, predicted = (config.model, vocab_size, length), objective.predicted(length) / length
    lengths = objective.lengths(length) if config.model.kind == "encoder-decoder" else None
    return {
        "mfu": flops_per_token(*shape, predicted, lengths),
        "hfu": hardware_flops_per_token(*shape, config.parallel.recompute, predicted, lengths),
    }
