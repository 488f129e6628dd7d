"""Llama and Mistral: rotary positions, RMSNorm, a gated feed-forward layer, grouped key/value heads; Mistral's window."""

from __future__ import annotations

from pretrain.huggingface.architecture import (
    DECODER,
    Architecture,
    Both,
    Choice,
    Inexpressible,
    Json,
    Option,
    Ours,
    Same,
    Settings,
    Theirs,
)
from pretrain.huggingface.rope import read_rope, write_rope
from pretrain.huggingface.rows import ModelClass, Row


def _write_biases(ours: Settings) -> Json:
    return {"attention_bias": ours["biases"], "mlp_bias": ours["biases"]}


def _read_biases(theirs: Json) -> Settings:
    attention, feed_forward = theirs.get("attention_bias", False), theirs.get("mlp_bias", False)
    if attention != feed_forward:
        raise Inexpressible("attention_bias", attention, f"it can be what mlp_bias is, {feed_forward!r}")
    return {"biases": attention}


def _read_window(theirs: Json) -> Settings:
    return {"attention_window": theirs.get("sliding_window", 4096)}


COMMON: tuple[Option, ...] = (
    Same("vocab_size", "vocab_size", 32000),
    Same("hidden_size", "hidden_size", 4096),
    Same("ffn_hidden_size", "intermediate_size"),
    Same("num_layers", "num_hidden_layers", 32),
    Same("num_heads", "num_attention_heads", 32),
    Same("num_kv_heads", "num_key_value_heads", None),
    Same("head_size", "head_dim", None),
    Same("max_positions", "max_position_embeddings"),
    Choice("activation", "hidden_act", {"swiglu": ("silu", "swish"), "geglu": ("gelu",)}, "silu"),
    Same("norm_epsilon", "rms_norm_eps", 1e-6),
    Same("attention_dropout", "attention_dropout", 0.0),
    Same("initial_scale", "initializer_range", 0.02),
    Same("tie_embeddings", "tie_word_embeddings", False),
    Both(write_rope, read_rope),
    Ours("norm", "rms"),
    Ours("norm_position", "pre"),
)
ROWS = (
    Row("model.embed_tokens.weight", ("embedding.weight",)),
    Row("model.layers.{layer}.input_layernorm.weight", ("blocks.{layer}.norm_1.weight",)),
    Row("model.layers.{layer}.self_attn.q_proj.{kind}", ("blocks.{layer}.attention.q.{kind}",)),
    Row("model.layers.{layer}.self_attn.k_proj.{kind}", ("blocks.{layer}.attention.k.{kind}",)),
    Row("model.layers.{layer}.self_attn.v_proj.{kind}", ("blocks.{layer}.attention.v.{kind}",)),
    Row("model.layers.{layer}.self_attn.o_proj.{kind}", ("blocks.{layer}.attention.out.{kind}",)),
    Row("model.layers.{layer}.post_attention_layernorm.weight", ("blocks.{layer}.norm_2.weight",)),
    Row("model.layers.{layer}.mlp.gate_proj.{kind}", ("blocks.{layer}.feed_forward.gate.{kind}",)),
    Row("model.layers.{layer}.mlp.up_proj.{kind}", ("blocks.{layer}.feed_forward.up.{kind}",)),
    Row("model.layers.{layer}.mlp.down_proj.{kind}", ("blocks.{layer}.feed_forward.down.{kind}",)),
    Row("model.norm.weight", ("norm.weight",)),
)
OUTPUT = (Row("lm_head.weight", ("head.weight",)),)


def _classes(name: str) -> tuple[ModelClass, ...]:
    """Theirs for questions names the body otherwise."""
    return (
        ModelClass(f"{name}ForCausalLM", ("causal", "instruction"), OUTPUT),
        ModelClass(f"{name}Model", ("causal", "instruction"), OUTPUT),
        ModelClass(
            f"{name}ForSequenceClassification",
            ("classification", "regression"),
            (Row("score.weight", ("task_head.weight",)),),
        ),
        ModelClass(f"{name}ForTokenClassification", ("tagging",), (Row("score.{kind}", ("task_head.{kind}",)),)),
    )


IGNORED = (r".*rotary_emb\.inv_freq",)
UNSAID = ("residual_dropout", "embedding_dropout")

LLAMA = Architecture(
    model_type="llama",
    prefix="model.",
    options=(
        *DECODER,
        *COMMON,
        Both(_write_biases, _read_biases),
        Ours("attention_window", None),
        Theirs("pretraining_tp", 1),
    ),
    rows=ROWS,
    classes=_classes("Llama"),
    ignored=IGNORED,
    unsaid=UNSAID,
)
MISTRAL = Architecture(
    model_type="mistral",
    prefix="model.",
    options=(
        *DECODER,
        *COMMON,
        Ours("biases", False),
        Both(lambda ours: {"sliding_window": _one_window(ours)}, _read_window),
    ),
    rows=ROWS,
    classes=_classes("Mistral"),
    ignored=IGNORED,
    unsaid=UNSAID,
)


def _one_window(ours: Settings) -> int | None:
    window = ours["attention_window"]
    if isinstance(window, list):
        raise Inexpressible("attention_window", window, "it can be one for all layers, or null")
    return window
