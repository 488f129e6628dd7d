"""The model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal

from parallel.layout import Problem
from pretrain.config.section import Section, meaning

GATED = ("swiglu", "geglu")


class RopeScaling(Section):
    """Stretching rotary positions to longer sequences; see kernels/rotary.py."""

    kind: Literal["linear", "ntk", "llama3"] = meaning("linear", "linear, ntk or llama3")
    factor: float = meaning(1.0, "how many times longer the sequences become", ge=1.0)
    low_frequency_factor: float = meaning(
        1.0, "llama3: below this many turns in the original length, slow down fully", gt=0
    )
    high_frequency_factor: float = meaning(4.0, "llama3: above this many turns, leave as it is", gt=0)
    original_positions: int = meaning(8192, "llama3: positions that the model was trained on", ge=1)

    def problems(self) -> Iterator[Problem]:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind == "llama3" and high <= low:
            yield Problem(
                "high_frequency_factor", f"{high} is not above low_frequency_factor {low}", "the usual are 4, 1"
            )


class LoRAConfig(Section):
    """Thin factors beside weights that do not learn (Hu et al. 2021)."""

    rank: int = meaning(8, "rows of the first factor, columns of the second", ge=1)
    alpha: float = meaning(16.0, "the factors' product counts alpha / rank times", gt=0)
    targets: list[Literal["q", "k", "v", "out", "up", "gate", "down"]] = meaning(
        ["q", "v"], "products of each layer that get factors, of q, k, v, out, up, gate, down"
    )
    dropout: float = meaning(0.0, "rate of what meets the first factor", ge=0, lt=1)

    def problems(self) -> Iterator[Problem]:
        if not self.targets:
            yield Problem("targets", "is empty", "name at least one, q and v as in the paper")


class ModelConfig(Section):
    """Shape of the Transformer."""

    kind: Literal["gpt", "bert", "encoder-decoder"] = meaning(
        "gpt", "gpt (a causal decoder), bert (a bidirectional encoder) or encoder-decoder (both, 2017)"
    )
    initial: str | None = meaning(
        None, "a run, or a folder of Hugging Face's, whose shape, weights and tokenizer to start from; null: none"
    )
    reset: int | Literal["all"] = meaning(
        0, "with initial: layers from the top that begin at random weights all the same; all: every weight does"
    )
    lora: LoRAConfig | None = meaning(
        None,
        "with initial: train thin factors and the task's head alone, {rank, alpha, targets, dropout} (LoRA); null: none",
    )
    num_layers: int = meaning(6, "Transformer blocks; of an encoder-decoder the encoder's", ge=1)
    decoder_layers: int | None = meaning(None, "encoder-decoder: the decoder's blocks; null: num_layers", ge=1)
    hidden_size: int = meaning(384, "features of the residual stream", ge=1)
    num_heads: int = meaning(6, "attention heads", ge=1)
    num_kv_heads: int | None = meaning(
        None, "key/value heads, each shared by equally many heads; null: num_heads", ge=1
    )
    head_size: int | None = meaning(None, "features of a head; null: hidden_size / num_heads", ge=1)
    ffn_hidden_size: int | None = meaning(
        None, "features inside the feed-forward layer; null: 4 x hidden_size, or 8/3 x (to the next 64) if gated", ge=1
    )
    activation: Literal["gelu", "gelu-tanh", "relu", "swiglu", "geglu"] = meaning(
        "gelu", "gelu, gelu-tanh (GPT-2's), relu, swiglu or geglu"
    )
    norm: Literal["layer", "rms"] = meaning("layer", "layer (LayerNorm) or rms (RMSNorm)")
    norm_position: Literal["pre", "post"] = meaning(
        "pre", "pre (before each layer, GPT-2) or post (after the residual, 2017)"
    )
    norm_epsilon: float = meaning(1e-5, "added to the variance", gt=0)
    positions: Literal["learned", "sinusoidal", "rope", "alibi", "none"] = meaning(
        "learned", "learned, sinusoidal, rope, alibi or none"
    )
    max_positions: int | None = meaning(
        None, "longest sequence that the model can take, in tokens; null: data.seq_length", ge=1
    )
    segments: int | None = meaning(
        None, "rows of the table of segment embeddings; null: 2 for bert, none for gpt", ge=0
    )
    embedding_norm: bool | None = meaning(None, "a norm after the embeddings; null: for bert with norm_position: post")
    rope_base: float = meaning(10000.0, "rope: base of the wave lengths", gt=1)
    rope_scaling: RopeScaling | None = meaning(
        None, "rope: stretching to longer sequences, {kind, factor, ...}; null: none"
    )
    attention_window: int | list[int | None] | None = meaning(
        None,
        "tokens that a position sees to each side that it sees, itself included; a list is repeated over the layers; null: all",
    )
    scale_embeddings: bool = meaning(False, "multiply the embeddings by sqrt(hidden_size), as in 2017")
    biases: bool = meaning(True, "biases in the linear layers and LayerNorms")
    tie_embeddings: bool = meaning(True, "one matrix for the embedding and the output layer")
    vocab_size: int | None = meaning(None, "rows of the vocabulary; null: the tokenizer's", ge=2)
    dropout: float = meaning(0.0, "dropout rate wherever none of its own is given below", ge=0, lt=1)
    embedding_dropout: float | None = meaning(None, "rate after the embedding; null: dropout", ge=0, lt=1)
    residual_dropout: float | None = meaning(None, "rate before each residual sum; null: dropout", ge=0, lt=1)
    attention_dropout: float | None = meaning(None, "rate of attention probabilities; null: dropout", ge=0, lt=1)
    initial_scale: float = meaning(0.02, "standard deviation of the initial weights", gt=0)
    scale_initial_by_depth: bool = meaning(
        True, "divide that by sqrt(2 x layers) where a layer adds to the residual (GPT-2)"
    )

    def problems(self) -> Iterator[Problem]:
        hidden, heads, kv_heads = self.hidden_size, self.num_heads, self.kv_heads
        if self.head_size is None and hidden % heads:
            mend = f"give {nearest_divisor(hidden, heads)} heads, or a head_size"
            yield Problem("hidden_size", f"{hidden} is not a multiple of num_heads {heads}", mend)
        if heads % kv_heads:
            mend = f"the nearest that works: {nearest_divisor(heads, kv_heads)}"
            yield Problem("num_kv_heads", f"num_heads {heads} is not a multiple of {kv_heads}", mend)
        yield from self._position_problems()
        if self.decoder_layers is not None and self.kind != "encoder-decoder":
            found = f"{self.decoder_layers} has no effect with kind: {self.kind}"
            yield Problem("decoder_layers", found, "remove it, or set kind: encoder-decoder")
        if self.kind == "encoder-decoder" and self.num_segments:
            yield Problem("segments", "an encoder-decoder has none", "remove it")
        if self.lora is not None and self.initial is None:
            yield Problem("lora", "adapts a trained model, and there is none", "name one as model.initial")
        if self.lora is not None and self.reset:
            yield Problem("reset", "begins layers at random weights, which lora leaves as they are", "remove one")
        windows = self.attention_window if isinstance(self.attention_window, list) else [self.attention_window]
        if not windows or any(window is not None and window < 1 for window in windows):
            mend = "give tokens >= 1, null, or a list of these"
            yield Problem("attention_window", f"{self.attention_window} shows no tokens", mend)

    def _position_problems(self) -> Iterator[Problem]:
        if self.positions == "rope" and self.size_of_head % 2:
            yield Problem("positions", f"rope needs an even head size, found {self.size_of_head}", "set head_size")
        if self.rope_scaling is not None and self.positions != "rope":
            mend = "remove it, or set positions: rope"
            yield Problem("rope_scaling", f"has no effect with positions: {self.positions}", mend)
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            yield Problem("hidden_size", f"sinusoidal positions need an even one, found {self.hidden_size}", "add 1")

    @property
    def causal(self) -> bool:
        """Whether a position sees only what is before it."""
        return self.kind == "gpt"

    @property
    def layers_of_decoder(self) -> int:
        """Blocks behind an encoder's."""
        return (self.decoder_layers or self.num_layers) if self.kind == "encoder-decoder" else 0

    @property
    def total_layers(self) -> int:
        return self.num_layers + self.layers_of_decoder

    @property
    def num_segments(self) -> int:
        return (2 if self.kind == "bert" else 0) if self.segments is None else self.segments

    @property
    def has_embedding_norm(self) -> bool:
        if self.embedding_norm is None:
            return self.kind == "bert" and self.norm_position == "post"
        return self.embedding_norm

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def size_of_head(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def feed_forward_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation in GATED:  # two matrices in, one out: as many weights as 4 x has with two (Shazeer 2020)
            return -(-8 * self.hidden_size // 3 // 64) * 64
        return 4 * self.hidden_size

    def window(self, layer: int) -> int | None:
        """Tokens that a position of this layer sees, itself included; None: all before it."""
        if isinstance(self.attention_window, list):
            return self.attention_window[layer % len(self.attention_window)]
        return self.attention_window

    @property
    def embedding_dropout_rate(self) -> float:
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def residual_dropout_rate(self) -> float:
        return self.dropout if self.residual_dropout is None else self.residual_dropout

    @property
    def attention_dropout_rate(self) -> float:
        return self.dropout if self.attention_dropout is None else self.attention_dropout


def layer_parameters(model: ModelConfig, cross: bool = False) -> int:
    """Weights of one Transformer block; cross: of one that attends to an encoder as well."""
    hidden, inner = model.hidden_size, model.feed_forward_size
    q, kv = model.num_heads * model.size_of_head, model.kv_heads * model.size_of_head
    up = 2 * inner if model.activation in GATED else inner
    bias = 1 if model.biases else 0
    attention = hidden * (q + 2 * kv) + q * hidden + bias * (q + 2 * kv + hidden)
    feed_forward = hidden * up + inner * hidden + bias * (up + hidden)
    return (1 + cross) * (attention + _norm_parameters(model)) + feed_forward + _norm_parameters(model)


def lora_parameters(model: ModelConfig, tensor: int = 1, cross: bool = False) -> int:
    """Weights of the factors of one block on one of `tensor` ranks: W (out, in) has rank x (in + out), of which the tensor
    ranks share what W is cut along. cross: of a block that attends to an encoder too."""
    if model.lora is None:
        return 0
    hidden, inner = model.hidden_size, model.feed_forward_size
    queries, keys = model.num_heads * model.size_of_head, model.kv_heads * model.size_of_head
    cut = {"q": queries, "k": keys, "v": keys, "out": queries, "up": inner, "gate": inner, "down": inner}
    times = {name: 2 if cross and name in ("q", "k", "v", "out") else 1 for name in model.lora.targets}
    return sum(count * model.lora.rank * (cut[name] // tensor + hidden) for name, count in times.items())


def body_parameters(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Weights of the embeddings, the blocks and the final norm, the vocabulary without padding."""
    hidden = model.hidden_size
    table = max(seq_length, model.max_positions or 0) if model.positions == "learned" else 0
    norms = int(model.norm_position == "pre") + int(model.has_embedding_norm)
    rows = vocab_size + table + model.num_segments
    blocks = model.num_layers * (layer_parameters(model) + lora_parameters(model))
    return rows * hidden + blocks + norms * _norm_parameters(model)


def pair_parameters(model: ModelConfig, vocab_size: int, lengths: tuple[int, int]) -> int:
    """Weights of an encoder-decoder for sources and targets of these lengths, the vocabulary without padding."""
    hidden, table = model.hidden_size, model.positions == "learned"
    rows = 2 * max(*lengths, model.max_positions or 0) if table else 0
    rows += vocab_size * (1 if model.tie_embeddings else 2)
    norms = 2 * (int(model.norm_position == "pre") + int(model.has_embedding_norm))
    blocks = model.num_layers * (layer_parameters(model) + lora_parameters(model))
    blocks += model.layers_of_decoder * (layer_parameters(model, cross=True) + lora_parameters(model, cross=True))
    return rows * hidden + blocks + norms * _norm_parameters(model)


def pooler_parameters(model: ModelConfig) -> int:
    """Weights of BERT's pooler: a product of the first position's state."""
    return model.hidden_size * (model.hidden_size + int(model.biases))


def parameter_count(model: ModelConfig, vocab_size: int, seq_length: int, pairs: bool = False) -> int:
    """Weights of the model with its pre-training heads, as a checkpoint holds them; pairs: BERT's for sentence pairs too."""
    count = body_parameters(model, vocab_size, seq_length)
    count += 0 if model.tie_embeddings else vocab_size * model.hidden_size
    if model.kind == "bert":
        transform = pooler_parameters(model) + _norm_parameters(model)  # of the same shape
        count += transform + (vocab_size if model.biases else 0)
        count += pooler_parameters(model) + 2 * (model.hidden_size + int(model.biases)) if pairs else 0
    return count


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.norm == "layer" and model.biases else 1)


def nearest_divisor(number: int, wished: int) -> int:
    """The divisor of `number` that is nearest to `wished`."""
    near = min(wished, number)
    for distance in count():  # outwards, as a wish lies mostly near a divisor, and `number` may be large
        for divisor in (near - distance, near + distance):
            if divisor > 0 and number % divisor == 0:
                return divisor
    raise AssertionError("1 divides every number")
