"""Tiny models of every architecture and option, ours as runs and transformers' as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kernels import noise
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.logical import logical_tensors, view
from pretrain.config.load import checked_config, dump_config
from pretrain.config.objective import TASKS
from pretrain.finetuning.opening import LABELS, keep_labels, task_of
from pretrain.models.bert import BERT as BertModel
from pretrain.models.make import make_model
from pretrain.models.transformer import EncoderDecoder
from pretrain.opening import State, folder_of
from pretrain.runs import keep_tokenizer
from pretrain.saving import write_manifest
from pretrain.sizes import Sizes
from pretrain.storage import Entry, Written
from pretrain.tasks.labels import LabelSet
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import vocabulary_of

LENGTH = 24
EOS = 2  # of the tests' tokenizer
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
BERT: dict[str, Any] = {
    **SIZES,
    "kind": "bert",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "scale_initial_by_depth": False,
}
MARIAN: dict[str, Any] = {
    **SIZES,
    "kind": "encoder-decoder",
    "positions": "sinusoidal",
    "norm_position": "post",
    "activation": "relu",
    "scale_embeddings": True,
    "initial_scale": 0.2,
    "scale_initial_by_depth": False,
}
# name -> our options, and the architecture that they are; of a BERT also the objective's pairs
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
    "bert": (BERT, "BertForPreTraining"),
    "bert masked": ({**BERT, "activation": "gelu-tanh", "segments": 3, "dropout": 0.1}, "BertForMaskedLM"),
    "bert untied": ({**BERT, "tie_embeddings": False, "vocab_size": 340, "max_positions": 40}, "BertForPreTraining"),
    "marian": (MARIAN, "MarianMTModel"),
    "marian deeper": ({**MARIAN, "num_layers": 1, "decoder_layers": 3, "activation": "gelu"}, "MarianMTModel"),
    "marian untied": (
        {**MARIAN, "tie_embeddings": False, "vocab_size": 340, "max_positions": 40, "scale_embeddings": False},
        "MarianMTModel",
    ),
}


def objective_of(name: str) -> dict[str, Any]:
    """Of the model of that name."""
    if name.startswith("marian"):
        return {"kind": "sequence-to-sequence"}
    if not name.startswith("bert"):
        return {"kind": "causal"}
    return {"kind": "masked", "pairs": "none" if "masked" in name else "order" if "untied" in name else "next"}


def write_run(
    run: Path,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    name: str = "",
    objective: dict[str, Any] | None = None,
    labels: tuple[str, ...] = (),
    length: int = LENGTH,
) -> Any:
    """A run of one checkpoint, as training leaves it, moments and all. Its biases and norms are away from 0 and 1, so that
    none can be missing unseen."""
    kind = None if objective is None else objective["kind"]
    values = {
        "model": {**options, "initial": "another"} if labels or "lora" in options or kind in TASKS else options,
        "objective": objective_of(name) if objective is None else objective,
        "data": {"seq_length": 2 * length if options.get("kind") == "encoder-decoder" else length},
        "run": {"dir": str(run)},
        "precision": {"compute": "fp32", "compile": "never"},
    }
    config = checked_config(values, "test")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    keep_tokenizer(run, tokenizer)
    words = vocabulary_of(config, tokenizer)
    sizes = Sizes(words.size)
    if config.objective.is_task:
        (run / LABELS).write_bytes(keep_labels(LabelSet(labels)))
        task = task_of(config, tokenizer, words, LabelSet(labels))
        sizes = Sizes(words.size, task.num_outputs, task.num_rows)
    model = make_model(config, Parts(), sizes).eval()
    initialise(model, 1)
    with torch.no_grad():
        for path, piece, parameter in logical_tensors(model):
            if parameter.dim() == 1 or path.endswith("lora_b"):
                part, zeros = view(parameter, piece), (0,) * parameter.dim()
                part.add_(noise.normal(noise.key(2, path), piece.shape, zeros, piece.shape), alpha=0.1)
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


def some_segments() -> Tensor:
    """(2, LENGTH)"""
    return (torch.arange(LENGTH) >= torch.tensor([[7], [15]])).long()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> list[Tensor]:
    """Of ours: over the vocabulary, and of pairs where there is a head for them. Sources are the ids backwards."""
    if isinstance(model, EncoderDecoder):
        return [model.logits(ids, model.encode(ids.flip(1)))]
    if not isinstance(model, BertModel):
        return [model.logits(ids)]
    states = model.states(ids, ids.shape[1], segments=some_segments())
    pairs = [model.pair_head(model.pooler(states[:, 0]))] if model.pairs else []
    return [model.head.logits(model.transform(states)), *pairs]


@torch.no_grad()
def logits_of_theirs(model: Any, ids: Tensor) -> list[Tensor]:
    if model.config.model_type == "marian":
        return [model(ids.flip(1), decoder_input_ids=ids).logits]
    if model.config.model_type != "bert":
        return [model(ids).logits]
    found = model(ids, token_type_ids=some_segments())
    return [found.logits] if "logits" in found else [found.prediction_logits, found.seq_relationship_logits]


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
MARIAN_SIZES = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "activation_function": "relu",
    "scale_embedding": True,
    "max_position_embeddings": LENGTH,
    "decoder_start_token_id": EOS,
    "eos_token_id": EOS,
    "forced_eos_token_id": None,
    "pad_token_id": 3,
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
    "bert": ("BertForPreTraining", LLAMA_SIZES),
    "bert masked": ("BertForMaskedLM", {**LLAMA_SIZES, "layer_norm_eps": 1e-5, "type_vocab_size": 3}),
    "bert untied": ("BertForMaskedLM", {**LLAMA_SIZES, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "marian": ("MarianMTModel", MARIAN_SIZES),
    "marian deeper": ("MarianMTModel", {**MARIAN_SIZES, "encoder_layers": 1, "activation_function": "gelu"}),
    "marian untied": ("MarianMTModel", {**MARIAN_SIZES, "tie_word_embeddings": False, "scale_embedding": False}),
}


def make_theirs(name: str, seed: int = 3) -> Any:
    kind, options = THEIRS[name]
    heads = {"GPT2": "LMHeadModel"}
    class_name = kind if kind.startswith(("Bert", "Marian")) else kind + heads.get(kind, "ForCausalLM")
    made = getattr(transformers, class_name)
    model = random_weights(made(made.config_class(**{**COMMON, **options})), seed)
    if kind == "MarianMTModel":
        for side in (model.model.encoder, model.model.decoder):
            side.embed_positions._init_weight()  # no weights, but they count as such
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    value = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(value))
