"""GPT-2: learned positions, LayerNorm before each layer, biases, one product for query, key and value stored (in, out)."""

from __future__ import annotations

from pretrain.huggingface.architecture import (
    DECODER,
    Architecture,
    Both,
    Choice,
    Equal,
    Json,
    Ours,
    Same,
    Settings,
    Theirs,
)
from pretrain.huggingface.rows import ModelClass, Row


def _write_inner(ours: Settings) -> Json:
    return {"n_inner": ours["ffn_hidden_size"]}


def _read_inner(theirs: Json) -> Settings:
    return {"ffn_hidden_size": theirs.get("n_inner")}  # null on both sides: 4 x the hidden size


OUTPUT = (Row("lm_head.weight", ("head.weight",)),)
GPT2 = Architecture(
    model_type="gpt2",
    prefix="transformer.",
    options=(
        *DECODER,
        Same("vocab_size", "vocab_size", 50257),
        Same("max_positions", "n_positions", 1024),
        Same("hidden_size", "n_embd", 768),
        Same("num_layers", "n_layer", 12),
        Same("num_heads", "n_head", 12),
        Both(_write_inner, _read_inner),
        Choice(
            "activation",
            "activation_function",
            {
                "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
                "gelu": ("gelu", "gelu_python"),
                "relu": ("relu",),
            },
            "gelu_new",
        ),
        Same("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Same("residual_dropout", "resid_pdrop", 0.1),
        Same("embedding_dropout", "embd_pdrop", 0.1),
        Same("attention_dropout", "attn_pdrop", 0.1),
        Same("initial_scale", "initializer_range", 0.02),
        Same("tie_embeddings", "tie_word_embeddings", True),
        Ours("positions", "learned"),
        Ours("norm", "layer"),
        Ours("norm_position", "pre"),
        Ours("biases", True),
        Ours("attention_window", None),
        Equal("num_kv_heads", lambda ours: ours["num_heads"], "num_heads"),
        Equal("head_size", lambda ours: ours["hidden_size"] / ours["num_heads"], "hidden_size / num_heads"),
        Theirs("scale_attn_weights", True),
        Theirs("scale_attn_by_inverse_layer_idx", False),
        Theirs("reorder_and_upcast_attn", False),
        Theirs("add_cross_attention", False),
    ),
    rows=(
        Row("transformer.wte.weight", ("embedding.weight",)),
        Row("transformer.wpe.weight", ("positions",)),
        Row("transformer.h.{layer}.ln_1.{kind}", ("blocks.{layer}.norm_1.{kind}",)),
        Row(
            "transformer.h.{layer}.attn.c_attn.{kind}",
            tuple(f"blocks.{{layer}}.attention.{part}.{{kind}}" for part in "qkv"),
            "turned",
        ),
        Row("transformer.h.{layer}.attn.c_proj.{kind}", ("blocks.{layer}.attention.out.{kind}",), "turned"),
        Row("transformer.h.{layer}.ln_2.{kind}", ("blocks.{layer}.norm_2.{kind}",)),
        Row("transformer.h.{layer}.mlp.c_fc.{kind}", ("blocks.{layer}.feed_forward.up.{kind}",), "turned"),
        Row("transformer.h.{layer}.mlp.c_proj.{kind}", ("blocks.{layer}.feed_forward.down.{kind}",), "turned"),
        Row("transformer.ln_f.{kind}", ("norm.{kind}",)),
    ),
    classes=(
        ModelClass("GPT2LMHeadModel", ("causal", "instruction"), OUTPUT),
        ModelClass("GPT2Model", ("causal", "instruction"), OUTPUT),
        ModelClass(
            "GPT2ForSequenceClassification",
            ("classification", "regression"),
            (Row("score.weight", ("task_head.weight",)),),
        ),
        ModelClass("GPT2ForTokenClassification", ("tagging",), (Row("classifier.{kind}", ("task_head.{kind}",)),)),
        ModelClass(
            "GPT2ForQuestionAnswering", ("question-answering",), (Row("qa_outputs.{kind}", ("task_head.{kind}",)),)
        ),
    ),
    ignored=(r".*\.attn\.(bias|masked_bias)",),
)
