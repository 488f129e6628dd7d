"""What autograd keeps of one micro-batch on one rank, counted from this model's code, product by product. Imports no torch.

Once where two operators save the same tensor; eager execution. Symbols: as in `pretrain.memory`; M an encoder's sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel.layout import Layout
from pretrain.config.model import GATED, ModelConfig
from pretrain.config.run import Config

FLOAT = 4  # bytes
VOCABULARY_MULTIPLE = 128  # parallel.layers


class Frozen(NamedTuple):
    """What of a rank's model does not learn: `elements` of its weights, and blocks from the bottom of the model with nothing
    in or below them that does, which keep no activations. A weight further up is counted as if its product kept its input."""

    elements: int = 0
    blocks: int = 0


ALL_LEARN = Frozen()


class Side(NamedTuple):
    """Of an encoder-decoder the stack that a layer is of: its sequence, whether it is causal, and M if it is the decoder."""

    length: int
    causal: bool
    memory: int


@dataclass(frozen=True)
class Place:
    """A rank's part of the model: layers of each of its chunks, and whether it has the model's ends."""

    config: Config
    layout: Layout
    vocab_size: int
    chunks: tuple[tuple[int, ...], ...]  # layer numbers
    first: bool
    last: bool
    stage: int
    frozen: Frozen = ALL_LEARN
    side: Side | None = None  # of an encoder-decoder, that of a layer

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.precision.compute == "bf16" else FLOAT

    @property
    def length(self) -> int:
        """S: of an encoder-decoder both sequences, or that of the side."""
        return self.side.length if self.side else sum(length for _, length in self.config.lengths)

    @property
    def causal(self) -> bool:
        return self.side.causal if self.side else self.model.causal

    def at(self, layer: int) -> Place:
        """The same beside one layer, numbered through the model: of an encoder-decoder on that layer's side."""
        if self.model.kind != "encoder-decoder":
            return self
        source, target = (length for _, length in self.config.lengths)
        encodes = layer < self.model.num_layers
        return replace(self, side=Side(source, False, 0) if encodes else Side(target, True, source))

    @property
    def rows(self) -> int:
        """r: tokens of a micro-batch on this context rank."""
        return self.config.batch.micro_size * self.length // self.layout.context

    @property
    def of_memory(self) -> int:
        """Rows of the encoder's states that a decoder's layer attends to."""
        return self.config.batch.micro_size * self.side.memory // self.layout.context if self.side else 0

    @property
    def between(self) -> int:
        """s: rows of activations between the parallel layers."""
        return self.rows // self.layout.tensor if self.layout.sequence else self.rows

    @property
    def hidden(self) -> int:
        """Bytes of a hidden state (r, H)."""
        return self.rows * self.model.hidden_size * self.element

    @property
    def residual(self) -> int:
        """Bytes of a hidden state between the layers (s, H)."""
        return self.between * self.model.hidden_size * self.element

    @property
    def predicted(self) -> int:
        """Rows of a micro-batch that meet the head."""
        if self.model.causal:
            return self.rows
        predicted = self.config.batch.micro_size * self.config.objective.predicted(self.config.data.seq_length)
        return predicted // (self.layout.context if self.model.kind == "encoder-decoder" else 1)

    @property
    def classes(self) -> int:
        """This rank's rows of the padded vocabulary."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // self.layout.tensor

    @property
    def features(self) -> int:
        """This rank's features of the feed-forward layer."""
        return self.model.feed_forward_size // self.layout.tensor


def saved_by_layer(place: Place, layer: int) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass."""
    if place.config.parallel.recompute == "full":
        return place.at(layer).residual
    return whole_layer(place, layer, place.config.parallel.recompute == "selective")


def whole_layer(place: Place, layer: int, selective: bool) -> int:
    """The same of one that is not made again, but for attention's products if `selective`."""
    place, model = place.at(layer), place.model
    masks = 2 * place.between * model.hidden_size if model.residual_dropout_rate else 0  # a byte an element
    linear_inputs = 2 * place.hidden  # of qkv and up; those of out and down are counted with what makes them
    core = attention_inputs(place) if selective else attention_saved(place, layer)
    cross = _cross(place, selective) if place.of_memory else 0
    output = _output(place, selective)
    return 2 * norm_saved(place) + linear_inputs + core + output + _feed_forward(place) + masks + cross


def _cross(place: Place, selective: bool) -> int:
    """Attention to the encoder's states, which are one tensor for all layers, and its norm and residual."""
    model = place.model
    mask = place.between * model.hidden_size if model.residual_dropout_rate else 0
    core = attention_inputs(place, place.of_memory) if selective else _cross_saved(place)
    return norm_saved(place) + place.hidden + core + _output(place, selective) + mask


def norm_saved(place: Place) -> int:
    """A norm's input, which is the residual stream, and what it makes besides its output. The root mean square is several
    operators on a CPU: it keeps the normed input, and of a bf16 one the float32 copy instead."""
    size = place.between * place.model.hidden_size
    if place.model.norm == "rms":
        return 2 * FLOAT * size + FLOAT * place.between
    return place.element * (size + 2 * place.between)


def attention_inputs(place: Place, memory: int = 0) -> int:
    """q, k and v as the product over heads takes them; without rope they are views of one tensor. memory: rows of the keys,
    where they are not the queries'."""
    model, tensor, element = place.model, place.layout.tensor, place.element
    queries = model.num_heads * model.size_of_head // tensor
    keys = model.kv_heads * model.size_of_head // tensor
    if place.layout.context > 1:  # made anew by the exchange; keys repeated until each rank gets whole ones
        groups = model.kv_heads // tensor
        while groups % place.layout.context:
            groups += model.kv_heads // tensor
        return element * (place.rows * queries + (memory or place.rows) * 2 * groups * model.size_of_head)
    turned = queries + keys if model.positions == "rope" and not memory else 0
    return element * (place.rows * (queries + turned) + (memory or place.rows) * 2 * keys)


def attention_saved(place: Place, layer: int) -> int:
    """What the product over heads keeps, its output left out: the library's operator its inputs and the logarithms of its
    sums, the plain one (windows, ALiBi, dropout) copies of them and every visible probability."""
    place, model = place.at(layer), place.model
    window = model.window(layer - (model.num_layers if place.of_memory else 0))
    windowed = window is not None and window < place.length
    if not windowed and model.positions != "alibi" and not _plain(place):
        return attention_inputs(place) + FLOAT * place.rows * model.num_heads // place.layout.tensor
    span, area = visible(place.length, window if windowed else None, place.causal)
    return _probabilities(place, span, area, windowed)


def _cross_saved(place: Place) -> int:
    assert place.side is not None
    if not _plain(place):
        heads = place.model.num_heads // place.layout.tensor
        return attention_inputs(place, place.of_memory) + FLOAT * place.rows * heads
    return _probabilities(place, place.side.memory, place.side.memory * place.side.length, False)


def _plain(place: Place) -> bool:
    """Whether the plain operator computes what has no window and no bias."""
    return place.model.attention_dropout_rate > 0 or alone(place.config)


def alone(config: Config) -> bool:
    """Whether documents, or packed pairs, are kept apart."""
    objective = config.objective
    return objective.kind == "sequence-to-sequence" or not objective.attention_across_documents


def _probabilities(place: Place, span: int, area: int, windowed: bool) -> int:
    """What the plain operator keeps. span: keys that its blocks of queries read; area: pairs of a query and a key."""
    model, element, batch = place.model, place.element, place.config.batch.micro_size
    heads, shared, apart = model.num_heads // place.layout.tensor, place.layout.context, alone(place.config)
    dropout = model.attention_dropout_rate > 0
    queries = element * place.rows * heads * model.size_of_head
    groups = max(model.kv_heads // place.layout.tensor // shared, 1)
    copies = 2 * element * batch * span * groups * model.size_of_head
    kept = FLOAT + (1 if dropout else 0)
    again = (
        element if dropout or element != FLOAT or windowed or apart else 0
    )  # the probabilities as they are multiplied
    maps = area if apart else 0  # who sees whom, a byte a pair, is each sequence's own then
    return queries + copies + batch * ((heads // shared) * area * (kept + again) + maps)


def visible(length: int, window: int | None, causal: bool = True) -> tuple[int, int]:
    """Keys that the blocks of queries of `kernels.attention` read, and pairs of a query and a key, of one head."""
    rows = max(64, -(-length // 4)) if causal or window is not None else length
    span = area = 0
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        last = stop if causal else length if window is None else min(length, stop + window - 1)
        keys = last - (max(0, start - window + 1) if window is not None else 0)
        span, area = span + keys, area + keys * (stop - start)
    return span, area


def _output(place: Place, selective: bool) -> int:
    """The attention's output, which its last product keeps; the exchange makes it twice, and the plain operator does not
    need it."""
    model = place.model
    size = place.element * place.rows * model.num_heads * model.size_of_head // place.layout.tensor
    return size * (2 if place.layout.context > 1 and not selective else 1)


def _feed_forward(place: Place) -> int:
    """What comes out of the first product, of the activation, and of the gate; relu needs its own output alone."""
    parts = {"relu": 1, **dict.fromkeys(GATED, 4)}.get(place.model.activation, 2)
    return place.element * place.rows * place.features * parts


def embedding(place: Place) -> int:
    """The embeddings' dropout."""
    return place.between * place.model.hidden_size if place.model.embedding_dropout_rate else 0


def final(place: Place) -> int:
    """The last norm, and the loss's gradients of hidden states and matrix, which it makes in the forward pass; an encoder's
    transform of the places that are predicted."""
    norm = norm_saved(place) if place.model.norm_position == "pre" else 0
    rows = place.element * place.predicted * place.model.hidden_size
    # What is picked twice, and what meets the activation and the norm.
    transform = 4 * rows if place.model.kind == "bert" else 0
    return norm + transform + rows + place.element * place.classes * place.model.hidden_size


def exchanged(place: Place) -> int:
    """What a stage received and sent for a micro-batch stays until its backward pass; received is the first layer's input,
    which only a bf16 root mean square does not keep itself."""
    copied = place.model.norm == "rms" and place.element != FLOAT
    return place.residual * ((0 if place.last else 1) + (1 if copied and not place.first else 0))
