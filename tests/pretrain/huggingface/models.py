"""Tiny models of every architecture and option, ours as runs and transformers' as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from parallel.layers import Parts
from parallel.logical import logical_tensors, view
from pretrain.config.load import checked_config, dump_config
from pretrain.models.gpt import GPT
from pretrain.opening import State, folder_of
from pretrain.runs import keep_tokenizer
from pretrain.saving import write_manifest
from pretrain.storage import Entry, Written
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.models.references import make_gpt

LENGTH = 24
SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 24, "num_heads": 4, "ffn_hidden_size": 40}
GPT2: dict[str, Any] = {**SIZES, "positions": "learned", "norm": "layer", "activation": "gelu-tanh"}
LLAMA: dict[str, Any] = {
    **SIZES,
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
    "biases": False,
    "tie_embeddings": False,
}
LLAMA3 = {
    "kind": "llama3",
    "factor": 4.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_positions": 16,
}
NEOX: dict[str, Any] = {**SIZES, "positions": "rope", "norm": "layer", "activation": "gelu"}
# name -> our options, and the architecture that they are
OURS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT2, "GPT2LMHeadModel"),
    "gpt2 untied": ({**GPT2, "tie_embeddings": False, "activation": "gelu", "norm_epsilon": 1e-3}, "GPT2LMHeadModel"),
    "gpt2 relu": ({**GPT2, "activation": "relu", "vocab_size": 340, "ffn_hidden_size": None}, "GPT2LMHeadModel"),
    "gpt2 longer": ({**GPT2, "max_positions": 31, "attention_dropout": 0.1, "dropout": 0.2}, "GPT2LMHeadModel"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "llama tied": ({**LLAMA, "tie_embeddings": True, "num_kv_heads": 2, "rope_base": 500.0}, "LlamaForCausalLM"),
    "llama biases": ({**LLAMA, "biases": True, "num_kv_heads": 1, "head_size": 10}, "LlamaForCausalLM"),
    "llama geglu": ({**LLAMA, "activation": "geglu", "norm_epsilon": 1e-3}, "LlamaForCausalLM"),
    "llama linear": ({**LLAMA, "rope_scaling": {"kind": "linear", "factor": 3.0}}, "LlamaForCausalLM"),
    "llama ntk": ({**LLAMA, "rope_scaling": {"kind": "ntk", "factor": 3.0}}, "LlamaForCausalLM"),
    "llama 3": ({**LLAMA, "rope_scaling": LLAMA3, "num_kv_heads": 2}, "LlamaForCausalLM"),
    "mistral": ({**LLAMA, "attention_window": 5, "num_kv_heads": 2}, "MistralForCausalLM"),
    "mistral list": ({**LLAMA, "attention_window": [5, 5], "tie_embeddings": True}, "MistralForCausalLM"),
    "neox": ({**NEOX, "tie_embeddings": False}, "GPTNeoXForCausalLM"),
    "neox tied": ({**NEOX, "activation": "relu", "rope_base": 300.0}, "GPTNeoXForCausalLM"),
}


def write_run(run: Path, options: dict[str, Any], tokenizer: Tokenizer, seed: int = 1) -> GPT:
    """A run of one checkpoint, as training leaves it, moments and all."""
    values = {
        "model": options,
        "data": {"seq_length": LENGTH},
        "run": {"dir": str(run)},
        "precision": {"compute": "fp32", "compile": "never"},
    }
    config = checked_config(values, "test")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    keep_tokenizer(run, tokenizer)
    model = make_gpt(config.model, config.model.vocab_size or tokenizer.vocab_size, LENGTH, seed)
    model.eval()
    weights = {name: view(p.detach(), piece).clone() for name, piece, p in logical_tensors(model)}
    moments = {f"{kind}/{name}": w * 0 for name, w in weights.items() for kind in ("exp_avg", "exp_avg_sq")}
    save(run, 7, {**weights, **moments})
    return model


def save(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """A checkpoint of whole tensors, by the format alone."""
    import hashlib

    from safetensors.torch import save_file

    folder = folder_of(run, step)
    folder.mkdir(parents=True)
    name = "rank-00000-000.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    content = (folder / name).read_bytes()
    files = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    entries = [Entry(key, shape, (0,) * len(shape), shape, name) for key, shape in shapes.items()]
    write_manifest(folder, State(step=step, updates=step), {"layout": "1 process"}, [Written(entries, files)])


def some_ids(vocab_size: int, length: int = LENGTH) -> Tensor:
    """(2, length)"""
    return (torch.arange(2 * length).view(2, length) * 48271 + 7) % vocab_size


def empty_gpt(options: dict[str, Any], vocab_size: int) -> GPT:
    return GPT(checked_config({"model": options}, "test").model, Parts(), vocab_size, LENGTH).eval()


# -- transformers' ------------------------------------------------------------------------------------------------------


def random_weights(model: Any, seed: int) -> Any:
    """No bias or norm at 0 or 1, so that none can be missing unseen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.08 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


COMMON = {"vocab_size": 340, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"}
LLAMA_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
GPT2_SIZES = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
ROPE3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt2 untied": ("GPT2", {**GPT2_SIZES, "tie_word_embeddings": False, "n_inner": 36, "activation_function": "gelu"}),
    "llama": ("Llama", {**LLAMA_SIZES, "num_key_value_heads": 2}),
    "llama tied": ("Llama", {**LLAMA_SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama biases": ("Llama", {**LLAMA_SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "llama linear": ("Llama", {**LLAMA_SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama 3": ("Llama", {**LLAMA_SIZES, "rope_scaling": ROPE3, "rope_theta": 700.0}),
    "mistral": ("Mistral", {**LLAMA_SIZES, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral without": ("Mistral", {**LLAMA_SIZES, "num_key_value_heads": 4, "sliding_window": None}),
    "neox": ("GPTNeoX", {**LLAMA_SIZES, "rotary_pct": 1.0, "use_parallel_residual": False, "rotary_emb_base": 400}),
}


def make_theirs(name: str, seed: int = 3) -> Any:
    kind, options = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **options})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return random_weights(getattr(transformers, f"{kind}{head}")(config), seed)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    value = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(value))
