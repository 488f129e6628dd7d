"""Arithmetic of a training step, for model FLOPs utilization (MFU): the share of the device's peak that the model's own
products need. Work that is done twice (recomputation) or thrown away (masked scores) does not count as useful twice.
"""

from __future__ import annotations

import re

import torch

from pretrain.config.model import ModelConfig, parameter_count

# Dense bfloat16 peaks without sparsity, TFLOP/s, from the makers' data sheets; the first that stands as whole words in the
# device's name counts (an RTX A4000 is no A40).
PEAKS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 150.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """Forward and backward: 6 a weight that multiplies, and 12 x heads x head size a visible key and layer (Chowdhery et
    al. 2022, "PaLM", appendix B, which counts masked keys too; a windowed layer counts its window)."""
    embeddings = vocab_size * model.hidden_size  # a look-up; tied, it multiplies once, as the head
    if model.positions == "learned":
        embeddings += max(seq_length, model.max_positions or 0) * model.hidden_size
    if model.tie_embeddings:
        embeddings -= vocab_size * model.hidden_size
    weights = parameter_count(model, vocab_size, seq_length) - embeddings
    keys = sum(min(model.window(layer) or seq_length, seq_length) for layer in range(model.num_layers))
    return 6.0 * weights + 12.0 * model.num_heads * model.size_of_head * keys


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
