"""GPT-NeoX with one layer after the other: rotary positions with LayerNorm and biases; query, key and value by head."""

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
from pretrain.huggingface.rope import read_rope, write_rope
from pretrain.huggingface.rows import ModelClass, Row


def _write(ours: Settings) -> Json:
    theirs = write_rope(ours)
    return {**theirs, "rotary_emb_base": theirs["rope_theta"]}


def _read(theirs: Json) -> Settings:
    return read_rope({"rope_theta": theirs.get("rotary_emb_base", 10000.0), **theirs})


OUTPUT = (Row("embed_out.weight", ("head.weight",)),)
NEOX = Architecture(
    model_type="gpt_neox",
    prefix="gpt_neox.",
    options=(
        *DECODER,
        Same("vocab_size", "vocab_size", 50432),
        Same("max_positions", "max_position_embeddings", 2048),
        Same("hidden_size", "hidden_size", 6144),
        Same("ffn_hidden_size", "intermediate_size", 24576),
        Same("num_layers", "num_hidden_layers", 44),
        Same("num_heads", "num_attention_heads", 64),
        Choice(
            "activation",
            "hidden_act",
            {"gelu": ("gelu",), "gelu-tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "relu": ("relu",)},
            "gelu",
        ),
        Same("norm_epsilon", "layer_norm_eps", 1e-5),
        Equal("embedding_dropout", lambda ours: ours["residual_dropout"], "residual_dropout"),
        Same("residual_dropout", "hidden_dropout", 0.0),
        Same("embedding_dropout", "hidden_dropout", 0.0),
        Same("attention_dropout", "attention_dropout", 0.0),
        Same("initial_scale", "initializer_range", 0.02),
        Same("tie_embeddings", "tie_word_embeddings", False),
        Both(_write, _read),
        Ours("norm", "layer"),
        Ours("norm_position", "pre"),
        Ours("biases", True),
        Ours("attention_window", None),
        Equal("num_kv_heads", lambda ours: ours["num_heads"], "num_heads"),
        Equal("head_size", lambda ours: ours["hidden_size"] / ours["num_heads"], "hidden_size / num_heads"),
        Theirs("rotary_pct", 1.0),
        Theirs("use_parallel_residual", False),
        Theirs("attention_bias", True),
    ),
    rows=(
        Row("gpt_neox.embed_in.weight", ("embedding.weight",)),
        Row("gpt_neox.layers.{layer}.input_layernorm.{kind}", ("blocks.{layer}.norm_1.{kind}",)),
        Row(
            "gpt_neox.layers.{layer}.attention.query_key_value.{kind}",
            tuple(f"blocks.{{layer}}.attention.{part}.{{kind}}" for part in "qkv"),
            "by head",
        ),
        Row("gpt_neox.layers.{layer}.attention.dense.{kind}", ("blocks.{layer}.attention.out.{kind}",)),
        Row("gpt_neox.layers.{layer}.post_attention_layernorm.{kind}", ("blocks.{layer}.norm_2.{kind}",)),
        Row("gpt_neox.layers.{layer}.mlp.dense_h_to_4h.{kind}", ("blocks.{layer}.feed_forward.up.{kind}",)),
        Row("gpt_neox.layers.{layer}.mlp.dense_4h_to_h.{kind}", ("blocks.{layer}.feed_forward.down.{kind}",)),
        Row("gpt_neox.final_layer_norm.{kind}", ("norm.{kind}",)),
    ),
    classes=(
        ModelClass("GPTNeoXForCausalLM", ("causal", "instruction"), OUTPUT),
        ModelClass("GPTNeoXModel", ("causal", "instruction"), OUTPUT),
        ModelClass(
            "GPTNeoXForSequenceClassification",
            ("classification", "regression"),
            (Row("score.weight", ("task_head.weight",)),),
        ),
        ModelClass("GPTNeoXForTokenClassification", ("tagging",), (Row("classifier.{kind}", ("task_head.{kind}",)),)),
        ModelClass(
            "GPTNeoXForQuestionAnswering", ("question-answering",), (Row("qa_outputs.{kind}", ("task_head.{kind}",)),)
        ),
    ),
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
