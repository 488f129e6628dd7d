"""Marian, the 2017 Transformer: an encoder and a decoder, sinusoidal positions, LayerNorm after each layer, one embedding.

Its table of positions has all sines before the cosines where ours alternates them (Vaswani et al. 2017, section 3.5), so
the features of the residual stream stand in another order in every tensor that reads or writes them. Its LayerNorms have
one epsilon, which config.json cannot tell.
"""

from __future__ import annotations

from pretrain.huggingface.architecture import (
    Architecture,
    Both,
    Choice,
    Equal,
    Inexpressible,
    Json,
    Option,
    Ours,
    Same,
    Settings,
    Theirs,
)
from pretrain.huggingface.rows import Fixed, ModelClass, Row

WRITES, READS = (0,), (1,)  # dimensions of the residual stream in what is added to it, and in what takes it
OBJECTIVES = ("sequence-to-sequence", "span-corruption", "prefix")


def _of_both(ours: str, theirs: str, default: int) -> Option:
    """An option that their encoder and decoder each have."""
    names = (f"encoder_{theirs}", f"decoder_{theirs}")

    def write(settings: Settings) -> Json:
        return dict.fromkeys(names, settings[ours])

    def read(config: Json) -> Settings:
        encoder, decoder = (config.get(name, default) for name in names)
        if encoder != decoder:
            raise Inexpressible(names[1], decoder, f"it can be what {names[0]} is, {encoder!r}")
        return {ours: encoder}

    return Both(write, read)


def _read_vocabulary(theirs: Json) -> Settings:
    size, decoders = theirs.get("vocab_size", 58101), theirs.get("decoder_vocab_size")
    if decoders not in (None, size):
        raise Inexpressible("decoder_vocab_size", decoders, f"it can be what vocab_size is, {size!r}")
    return {"vocab_size": size}


def _stack(side: str, layer: str, *attentions: tuple[str, str, str]) -> tuple[Row, ...]:
    """Rows of the encoder or the decoder. attentions: names of each of theirs, of ours, and of our norm behind it."""
    theirs, ours = f"model.{side}.layers.{{{layer}}}", f"{side}.blocks.{{{layer}}}"
    rows = []
    for attention, mine, norm in attentions:
        for part in "qkv":
            rows.append(
                Row(f"{theirs}.{attention}.{part}_proj.{{kind}}", (f"{ours}.{mine}.{part}.{{kind}}",), even_first=READS)
            )
        rows.append(Row(f"{theirs}.{attention}.out_proj.{{kind}}", (f"{ours}.{mine}.out.{{kind}}",), even_first=WRITES))
        rows.append(Row(f"{theirs}.{attention}_layer_norm.{{kind}}", (f"{ours}.{norm}.{{kind}}",), even_first=WRITES))
    return (
        *rows,
        Row(f"{theirs}.fc1.{{kind}}", (f"{ours}.feed_forward.up.{{kind}}",), even_first=READS),
        Row(f"{theirs}.fc2.{{kind}}", (f"{ours}.feed_forward.down.{{kind}}",), even_first=WRITES),
        Row(f"{theirs}.final_layer_norm.{{kind}}", (f"{ours}.norm_2.{{kind}}",), even_first=WRITES),
    )


SELF, CROSS = ("self_attn", "attention", "norm_1"), ("encoder_attn", "cross", "cross_norm")
OUTPUT = (Row("lm_head.weight", ("head.weight",), even_first=READS),)
POSITIONS = tuple(Fixed(f"model.{side}.embed_positions.weight", "waves") for side in ("encoder", "decoder"))

MARIAN = Architecture(
    model_type="marian",
    prefix="model.",
    options=(
        Ours("kind", "encoder-decoder"),
        Both(lambda ours: {"vocab_size": ours["vocab_size"]}, _read_vocabulary),
        Same("max_positions", "max_position_embeddings", 1024),
        Same("hidden_size", "d_model", 1024),
        Same("num_layers", "encoder_layers", 12),
        Same("decoder_layers", "decoder_layers", 12),
        _of_both("num_heads", "attention_heads", 16),
        _of_both("ffn_hidden_size", "ffn_dim", 4096),
        Choice(
            "activation",
            "activation_function",
            {"gelu": ("gelu", "gelu_python"), "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh"), "relu": ("relu",)},
            "gelu",
        ),
        Ours("norm_epsilon", 1e-5),
        Equal("embedding_dropout", lambda ours: ours["residual_dropout"], "residual_dropout"),
        Same("residual_dropout", "dropout", 0.1),
        Same("embedding_dropout", "dropout", 0.1),
        Same("attention_dropout", "attention_dropout", 0.0),
        Same("initial_scale", "init_std", 0.02),
        Same("scale_embeddings", "scale_embedding", False),
        Same("tie_embeddings", "tie_word_embeddings", True),
        Theirs("share_encoder_decoder_embeddings", True),
        Ours("positions", "sinusoidal"),
        Ours("norm", "layer"),
        Ours("norm_position", "post"),
        Ours("embedding_norm", False),
        Ours("segments", 0),
        Ours("biases", True),
        Ours("attention_window", None),
        Equal("num_kv_heads", lambda ours: ours["num_heads"], "num_heads"),
        Equal("head_size", lambda ours: ours["hidden_size"] / ours["num_heads"], "hidden_size / num_heads"),
        Both(
            lambda ours: {"forced_eos_token_id": None}, lambda theirs: {}
        ),  # null: a cut text does not end; left out: 0
    ),
    rows=(
        Row("model.shared.weight", ("embedding.weight",), even_first=READS),
        *_stack("encoder", "layer", SELF),
        *_stack("decoder", "decoder_layer", SELF, CROSS),
    ),
    classes=(
        ModelClass("MarianMTModel", OBJECTIVES, OUTPUT, fixed=(*POSITIONS, Fixed("final_logits_bias", "no bias"))),
        ModelClass("MarianModel", OBJECTIVES, OUTPUT, fixed=POSITIONS),
    ),
    renamed=((r"^(model\.)?(encoder|decoder)\.embed_tokens\.weight$", "model.shared.weight"),),  # where it is copied
    ends=(("decoder_start_token_id", 58100), ("eos_token_id", 0)),
)
