"""Independent models: transformers' GPT-2 and Llama with our weights, and a naive GPT for every option.

Weights and gradients of ours are dictionaries by canonical name, {"blocks.0.attention.q.weight": ...}; `as_gpt2` and
`as_llama` give them the other side's names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kernels import noise
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.logical import logical_tensors, view
from pretrain.config.model import ModelConfig
from pretrain.models.gpt import GPT

Named = dict[str, Tensor]

GPT2_SHAPE: dict[str, Any] = {
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu-tanh",
    "biases": True,
    "tie_embeddings": True,
}
LLAMA_SHAPE: dict[str, Any] = {
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
    "biases": False,
    "tie_embeddings": False,
}


def make_gpt(config: ModelConfig, vocab_size: int, seq_length: int, seed: int = 1, **options: Any) -> GPT:
    """Ours, with biases and norms away from 0 and 1 so that none of them can be missing unseen."""
    model = GPT(config, Parts(), vocab_size, seq_length, **options)
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                rows = (len(parameter),)
                parameter.add_(noise.normal(noise.key(seed, name), rows, (0,), rows), alpha=0.1)
    return model


def weights_of(model: nn.Module) -> Named:
    """Copies of the logical tensors, without padding."""
    return {name: view(parameter.detach(), piece).clone() for name, piece, parameter in logical_tensors(model)}


def gradients_of(model: nn.Module) -> Named:
    found = {}
    for name, piece, parameter in logical_tensors(model):
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = view(parameter.grad, piece).clone()
    return found


def assert_gradients_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference in norm is at most tolerance x its norm, or a thousandth of the global one (key biases
    without rope have a true gradient of zero)."""
    assert set(found) == set(wanted)
    whole = math.sqrt(sum(gradient.double().square().sum().item() for gradient in wanted.values()))
    for name, gradient in wanted.items():
        difference = (found[name].double() - gradient.double()).norm().item()
        assert difference <= tolerance * max(gradient.double().norm().item(), 1e-3 * whole), f"{name}: {difference}"


# -- transformers ------------------------------------------------------------------------------------------------------


def make_gpt2(config: ModelConfig, vocab_size: int, length: int) -> GPT2LMHeadModel:
    theirs = GPT2Config(
        vocab_size=vocab_size,
        n_positions=length,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.feed_forward_size,
        activation_function="gelu_new",
        layer_norm_epsilon=config.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(theirs)


def make_llama(config: ModelConfig, vocab_size: int, length: int) -> LlamaForCausalLM:
    theirs = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=length,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.size_of_head,
        intermediate_size=config.feed_forward_size,
        rms_norm_eps=config.norm_epsilon,
        rope_theta=config.rope_base,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(theirs)


def as_gpt2(ours: Named) -> Named:
    """GPT-2's Conv1D weights are (in, out), query, key and value in one."""
    theirs = {"transformer.wte.weight": ours["embedding.weight"], "transformer.wpe.weight": ours["positions"]}
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = ours[f"norm.{kind}"]
        for i in range(num_layers(ours)):
            block, to = f"blocks.{i}", f"transformer.h.{i}"
            theirs[f"{to}.ln_1.{kind}"] = ours[f"{block}.norm_1.{kind}"]
            theirs[f"{to}.ln_2.{kind}"] = ours[f"{block}.norm_2.{kind}"]
            qkv = torch.cat([ours[f"{block}.attention.{part}.{kind}"] for part in "qkv"])
            theirs[f"{to}.attn.c_attn.{kind}"] = turned(qkv)
            theirs[f"{to}.attn.c_proj.{kind}"] = turned(ours[f"{block}.attention.out.{kind}"])
            theirs[f"{to}.mlp.c_fc.{kind}"] = turned(ours[f"{block}.feed_forward.up.{kind}"])
            theirs[f"{to}.mlp.c_proj.{kind}"] = turned(ours[f"{block}.feed_forward.down.{kind}"])
    return theirs


def as_llama(ours: Named) -> Named:
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    for i in range(num_layers(ours)):
        block, to = f"blocks.{i}", f"model.layers.{i}"
        theirs[f"{to}.input_layernorm.weight"] = ours[f"{block}.norm_1.weight"]
        theirs[f"{to}.post_attention_layernorm.weight"] = ours[f"{block}.norm_2.weight"]
        for part in ("q", "k", "v", "out"):
            name = f"{to}.self_attn.{part[0]}_proj.weight"
            theirs[name] = ours[f"{block}.attention.{part}.weight"]
        for part in ("gate", "up", "down"):
            theirs[f"{to}.mlp.{part}_proj.weight"] = ours[f"{block}.feed_forward.{part}.weight"]
    return theirs


def turned(x: Tensor) -> Tensor:
    return x.T.contiguous() if x.dim() == 2 else x


def num_layers(ours: Named) -> int:
    return len({name.split(".")[1] for name in ours if name.startswith("blocks.")})


def load(theirs: nn.Module, weights: Named) -> None:
    """Every parameter of theirs, each once."""
    with torch.no_grad():
        parameters = dict(theirs.named_parameters())
        assert set(parameters) == set(weights)
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


# -- every option, naively ---------------------------------------------------------------------------------------------


def naive_loss(config: ModelConfig, weights: Named, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, from the formulas, without any of our kernels."""
    length = inputs.shape[1]
    x = F.embedding(inputs, weights["embedding.weight"])
    if config.positions == "learned":
        x = x + weights["positions"][:length]
    if config.positions == "sinusoidal":
        x = x + sinusoids(length, config.hidden_size).to(x)
    for i in range(config.num_layers):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        parts = (("norm_1", naive_attention), ("norm_2", naive_feed_forward))
        for norm, part in parts:
            if config.norm_position == "pre":
                x = x + part(config, block, naive_norm(config, block, norm, x), i)
            else:
                x = naive_norm(config, block, norm, x + part(config, block, x, i))
    if config.norm_position == "pre":
        x = naive_norm(config, weights, "norm", x)
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    losses = F.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


def naive_norm(config: ModelConfig, weights: Named, name: str, x: Tensor) -> Tensor:
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if config.norm == "layer" and config.biases else x


def linear(weights: Named, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def naive_feed_forward(config: ModelConfig, block: Named, x: Tensor, layer: int) -> Tensor:
    up = linear(block, "feed_forward.up", x)
    gate = linear(block, "feed_forward.gate", x) if "feed_forward.gate.weight" in block else None
    y = {
        "gelu": lambda: F.gelu(up),
        "gelu-tanh": lambda: F.gelu(up, approximate="tanh"),
        "relu": lambda: up.clamp(min=0),
        "swiglu": lambda: F.silu(gate) * up,
        "geglu": lambda: F.gelu(gate) * up,
    }[config.activation]()
    return linear(block, "feed_forward.down", y)


def naive_attention(config: ModelConfig, block: Named, x: Tensor, layer: int) -> Tensor:
    """Head by head."""
    length, size, share = x.shape[1], config.size_of_head, config.num_heads // config.kv_heads
    q, k, v = (linear(block, f"attention.{part}", x).split(size, dim=-1) for part in "qkv")
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    window = config.window(layer) or length
    hidden = (distance < 0) | (distance >= window)
    heads = []
    for n in range(config.num_heads):
        query, key, value = q[n], k[n // share], v[n // share]
        if config.positions == "rope":
            query, key = turn(query, config.rope_base), turn(key, config.rope_base)
        scores = query @ key.transpose(1, 2) / math.sqrt(size)
        if config.positions == "alibi":
            scores = scores - 2.0 ** (-8 * (n + 1) / config.num_heads) * distance  # a power of two of heads
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
    return linear(block, "attention.out", torch.cat(heads, dim=-1))


def turn(x: Tensor, base: float) -> Tensor:
    """x (B, S, D): pairs of features (i, i + D/2) as complex numbers."""
    half = x.shape[-1] // 2
    frequencies = base ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turns = torch.exp(1j * torch.arange(x.shape[1])[:, None] * frequencies)
    y = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat((y.real, y.imag), dim=-1).to(x.dtype)


def sinusoids(length: int, hidden: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5, number by number."""
    table = torch.zeros(length, hidden, dtype=torch.float64)
    for place in range(length):
        for i in range(0, hidden, 2):
            angle = place / 10000 ** (i / hidden)
            table[place, i], table[place, i + 1] = math.sin(angle), math.cos(angle)
    return table
