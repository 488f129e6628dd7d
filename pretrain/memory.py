"""Peak memory of one rank, from the config and the layout alone. Imports no torch.

What is alive on a rank, in bytes:
- states: weights, masters, moments and gradients, and ZeRO's shares of these (Rajbhandari et al. 2020, sections 3 and 5);
- activations that the backward pass needs, of every micro-batch that is in flight (Korthikanti et al. 2022, section 4;
  Narayanan et al. 2021, section 2.2). Counted from this model's code, product by product: what autograd saves, once where
  two operators save the same tensor;
- what works for a moment: the logits of a chunk, gradients of activations, buckets of a reduction.

Three moments can be the highest: the last stage's loss, the start of a backward pass, the optimizer's step. Eager
execution is what is counted; a compiled layer keeps less. What each product's own workspace takes, the libraries and the
communication's buffers are left out.

Symbols: P parameters on this rank, B sequences of a micro-batch, S sequence, H hidden, V vocabulary, D head size, t tensor
and c context ranks. r = B S / c rows of this context rank, s those between the layers (r / t under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel.layout import Layout
from pretrain.config.model import GATED, ModelConfig, layer_parameters, lora_parameters, pooler_parameters
from pretrain.config.run import Config

FLOAT = 4  # bytes
VOCABULARY_MULTIPLE = 128  # parallel.vocabulary
BUCKET = 2**23  # elements of a flat reduction, parallel.averaging
GATHERED = 10**9  # elements that DeepSpeed's ZeRO-3 keeps whole at most (stage3_max_live_parameters)
DROPOUT_BYTES = 25  # a pair of a block of queries: probabilities, the hash of its places step by step, the mask
LOGIT_BYTES = 17  # a class of a row: logits, exp, the target's place as bool and float32, their difference


class Memory(NamedTuple):
    """Bytes at the highest moment. On a GPU those `on_host` are in the host's memory, the others in the device's."""

    weights: int
    optimizer: int  # masters and moments
    gradients: int
    buffers: int  # of reductions and of offloading
    activations: int
    working: int
    on_host: int  # of the above
    moment: str  # loss, backward or step

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.buffers + self.activations + self.working


class Frozen(NamedTuple):
    """What of a rank's model does not learn: `elements` of its weights, and blocks from the bottom of the model with nothing
    in or below them that does, which keep no activations. A weight further up is counted as if its product kept its input."""

    elements: int = 0
    blocks: int = 0


ALL_LEARN = Frozen()


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

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.precision.compute == "bf16" else FLOAT

    @property
    def rows(self) -> int:
        """r: tokens of a micro-batch on this context rank."""
        return self.config.batch.micro_size * self.config.data.seq_length // self.layout.context

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
        return self.config.batch.micro_size * self.config.objective.predicted(self.config.data.seq_length)

    @property
    def classes(self) -> int:
        """This rank's rows of the padded vocabulary."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // self.layout.tensor

    @property
    def features(self) -> int:
        """This rank's features of the feed-forward layer."""
        return self.model.feed_forward_size // self.layout.tensor


def memory(
    config: Config,
    layout: Layout,
    layers: Sequence[int],
    vocab_size: int,
    stage: int = 0,
    size: int | None = None,
    frozen: Frozen = ALL_LEARN,
) -> Memory:
    """Of a rank of pipeline stage `stage`; layers: of each part of the pipeline (`pretrain.build.stage_layers`); size:
    sequences a step over all ranks, the config's unless given; frozen: of the rank (`pretrain.trainable.frozen_on`).
    precision.compute must be decided."""
    place = replace(_place(config, layout, layers, vocab_size, stage), frozen=frozen)
    micro_batches = (size or config.batch.size) // layout.data // config.batch.micro_size
    states = _states(place)
    begin = frozen.blocks if place.first else 0  # what a stage receives has a gradient in any case
    held = [sum(saved_by_layer(place, layer) for layer in chunk) for chunk in place.chunks]
    held[0] = sum(saved_by_layer(place, layer) for layer in place.chunks[0] if layer >= begin)
    held[0] += _embedding(place) if place.first and not frozen.blocks else 0
    held[-1] += _final(place) if place.last else 0
    held = [bytes + (_exchanged(place) if layout.pipeline > 1 else 0) for bytes in held]
    flying = in_flight(layout, stage, micro_batches)
    moments = []
    for count, gradients in _heights(len(flying), micro_batches * layout.virtual, states.gradients, states.kept):
        activations = sum(held[chunk] for chunk in flying[:count])
        moments += [
            states.at("loss", gradients, activations, max(_loss(place) if place.last else 0, _dropping(place))),
            states.at("backward", gradients, activations, _backward(place)),
        ]
    moments.append(states.at("step", states.gradients, 0, 0))
    return max(moments, key=lambda moment: moment.peak)


def _place(config: Config, layout: Layout, layers: Sequence[int], vocab_size: int, stage: int) -> Place:
    first = [sum(layers[:part]) for part in range(len(layers) + 1)]
    mine = range(stage, len(layers), layout.pipeline)
    chunks = tuple(tuple(range(first[part], first[part + 1])) for part in mine)
    return Place(config, layout, vocab_size, chunks, stage == 0, stage == layout.pipeline - 1, stage)


# -- states --------------------------------------------------------------------------------------------------------


class _States(NamedTuple):
    weights: int
    optimizer: int
    gradients: int
    kept: int  # of the gradients, those that a step leaves allocated
    buffers: int  # that are there all the time
    reducing: int  # allocated when a backward pass begins, released at its end; in the step again
    step: int  # allocated for the step alone
    on_host: int

    def at(self, moment: str, gradients: int, activations: int, working: int) -> Memory:
        buffers = self.buffers
        buffers += self.reducing if moment != "loss" else 0
        buffers += self.step if moment == "step" else 0
        return Memory(self.weights, self.optimizer, gradients, buffers, activations, working, self.on_host, moment)


def parameters(place: Place) -> int:
    """P: elements of this rank's weights, the padding of the vocabulary included."""
    model, tensor = place.model, place.layout.tensor
    biased = 1 if model.biases else 0
    whole = (4 if biased and model.norm == "layer" else 2) * model.hidden_size + 2 * biased * model.hidden_size
    layer = (layer_parameters(model) - whole) // tensor + whole  # norms and row biases are not cut
    layer += lora_parameters(model, tensor)
    count = layer * sum(len(chunk) for chunk in place.chunks)
    matrix = place.classes * model.hidden_size
    ends = [place.first, place.last] if not model.tie_embeddings else [place.first or place.last]
    count += matrix * (sum(ends) if not place.config.objective.is_task else place.first)
    norm = model.hidden_size * (2 if biased and model.norm == "layer" else 1)
    if place.first:
        table = max(place.config.data.seq_length, model.max_positions or 0) if model.positions == "learned" else 0
        count += (table + model.num_segments) * model.hidden_size + (norm if model.has_embedding_norm else 0)
    if place.last:
        count += norm if model.norm_position == "pre" else 0
        count += 0 if model.causal else _encoder_head(place, norm)
    return count


def _encoder_head(place: Place, norm: int) -> int:
    """Weights of the transform, the vocabulary's bias, and of the pairs' head."""
    model, paired = place.model, place.config.objective.pairs != "none"
    dense = pooler_parameters(model)
    pairs = dense + 2 * (model.hidden_size + int(model.biases)) if paired else 0
    return dense + norm + (place.classes if model.biases else 0) + pairs


def _states(place: Place) -> _States:
    """Of the engine that `parallel.zero.make_engine` picks."""
    layout, count, element = place.layout, parameters(place), place.element
    weights, replicas = element * count, layout.data * layout.context
    whole, count = count, count - place.frozen.elements  # of those that learn
    if layout.zero == 0 or (replicas == 1 and not layout.offload):
        masters = 0 if element == FLOAT else FLOAT * count
        flat = FLOAT * min(BUCKET, count) if replicas > 1 else 0
        return _States(weights, masters + 2 * FLOAT * count, FLOAT * count, 0, 0, flat, 0, 0)
    share, bucket = -(-count // replicas), FLOAT * min(BUCKET, count)
    optimizer = 3 * FLOAT * share
    if layout.zero == 1 and element == FLOAT:
        return _States(weights, optimizer, FLOAT * count, 0, bucket, 0, 0, 0)
    if layout.zero == 1:  # its accumulators stay between the steps, its bucket does not
        return _States(weights, optimizer, FLOAT * count, FLOAT * count, 0, 0, bucket, 0)
    if layout.zero == 2:
        return _zero_2(place, weights, count, share, optimizer)
    weights = element * (-(-whole // replicas) + min(whole, GATHERED))
    host = optimizer if layout.offload else 0
    return _States(weights, optimizer, FLOAT * share, FLOAT * share, bucket, 0, FLOAT * share, host)


def _zero_2(place: Place, weights: int, count: int, share: int, optimizer: int) -> _States:
    """Its buckets hold gradients as they come, one while the other is reduced. Offloading keeps two more copies of the
    share's gradients, one of its weights, and two of the largest weight."""
    element, bucket = place.element, 2 * place.element * min(BUCKET, count)
    gradients = FLOAT * share
    if not place.layout.offload:
        return _States(weights, optimizer, gradients, 0, 0, bucket, 0, 0)
    largest = element * _largest(place)
    buffers = FLOAT * share + element * share + 2 * largest
    host = optimizer + gradients + FLOAT * share + element * share + largest
    return _States(weights, optimizer, gradients, gradients, buffers, bucket, 0, host)


def _largest(place: Place) -> int:
    """Elements of the largest weight."""
    return place.model.hidden_size * max(place.classes * (place.first or place.last), _up(place))


def _up(place: Place) -> int:
    """Features that come out of the feed-forward layer's first product."""
    return place.features * (2 if place.model.activation in GATED else 1)


# -- activations ---------------------------------------------------------------------------------------------------


def saved_by_layer(place: Place, layer: int) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass."""
    if place.config.parallel.recompute == "full":
        return place.residual
    return _whole_layer(place, layer, place.config.parallel.recompute == "selective")


def _whole_layer(place: Place, layer: int, selective: bool) -> int:
    model = place.model
    masks = 2 * place.between * model.hidden_size if model.residual_dropout_rate else 0  # a byte an element
    linear_inputs = 2 * place.hidden  # of qkv and up; those of out and down are counted with what makes them
    core = attention_inputs(place) if selective else attention_saved(place, layer)
    return (
        2 * norm_saved(place) + linear_inputs + core + _output(place, layer, selective) + _feed_forward(place) + masks
    )


def norm_saved(place: Place) -> int:
    """A norm's input, which is the residual stream, and what it makes besides its output. The root mean square is several
    operators on a CPU: it keeps the normed input, and of a bf16 one the float32 copy instead."""
    size = place.between * place.model.hidden_size
    if place.model.norm == "rms":
        return 2 * FLOAT * size + FLOAT * place.between
    return place.element * (size + 2 * place.between)


def attention_inputs(place: Place) -> int:
    """q, k and v as the product over heads takes them; without rope they are views of one tensor."""
    model, tensor, element = place.model, place.layout.tensor, place.element
    queries = model.num_heads * model.size_of_head // tensor
    keys = model.kv_heads * model.size_of_head // tensor
    if place.layout.context > 1:  # made anew by the exchange; keys repeated until each rank gets whole ones
        groups = model.kv_heads // tensor
        while groups % place.layout.context:
            groups += model.kv_heads // tensor
        return element * place.rows * (queries + 2 * groups * model.size_of_head)
    turned = queries + keys if model.positions == "rope" else 0
    return element * place.rows * (queries + 2 * keys + turned)


def attention_saved(place: Place, layer: int) -> int:
    """What the product over heads keeps, its output left out: the library's operator its inputs and the logarithms of its
    sums, the plain one (windows, ALiBi, dropout) copies of them and every visible probability."""
    model, element = place.model, place.element
    heads, length = model.num_heads // place.layout.tensor, place.config.data.seq_length
    window = model.window(layer)
    windowed = window is not None and window < length
    dropout = model.attention_dropout_rate > 0
    alone = not place.config.objective.attention_across_documents
    if not windowed and not alone and model.positions != "alibi" and not dropout:
        return attention_inputs(place) + FLOAT * place.rows * heads
    span, area = visible(length, window if windowed else None, model.causal)
    shared = place.layout.context
    queries = element * place.rows * heads * model.size_of_head
    groups = max(model.kv_heads // place.layout.tensor // shared, 1)
    copies = 2 * element * place.config.batch.micro_size * span * groups * model.size_of_head
    kept = FLOAT + (1 if dropout else 0)
    again = (
        element if dropout or element != FLOAT or windowed or alone else 0
    )  # the probabilities as they are multiplied
    maps = area if alone else 0  # who sees whom, a byte a pair, is each sequence's own then
    return queries + copies + place.config.batch.micro_size * ((heads // shared) * area * (kept + again) + maps)


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


def _output(place: Place, layer: int, selective: bool) -> int:
    """The attention's output, which its last product keeps; the exchange makes it twice, and the plain operator does not
    need it."""
    model = place.model
    size = place.element * place.rows * model.num_heads * model.size_of_head // place.layout.tensor
    return size * (2 if place.layout.context > 1 and not selective else 1)


def _feed_forward(place: Place) -> int:
    """What comes out of the first product, of the activation, and of the gate; relu needs its own output alone."""
    parts = {"relu": 1, **dict.fromkeys(GATED, 4)}.get(place.model.activation, 2)
    return place.element * place.rows * place.features * parts


def _embedding(place: Place) -> int:
    return place.between * place.model.hidden_size if place.model.embedding_dropout_rate else 0


def _final(place: Place) -> int:
    """The last norm, and the loss's gradients of hidden states and matrix, which it makes in the forward pass; an encoder's
    transform of the places that are predicted."""
    norm = norm_saved(place) if place.model.norm_position == "pre" else 0
    rows = place.element * place.predicted * place.model.hidden_size
    transform = (
        0 if place.model.causal else 4 * rows
    )  # what is picked twice, and what meets the activation and the norm
    return norm + transform + rows + place.element * place.classes * place.model.hidden_size


def _exchanged(place: Place) -> int:
    """What a stage received and sent for a micro-batch stays until its backward pass; received is the first layer's input,
    which only a bf16 root mean square does not keep itself."""
    copied = place.model.norm == "rms" and place.element != FLOAT
    return place.residual * ((0 if place.last else 1) + (1 if copied and not place.first else 0))


def in_flight(layout: Layout, stage: int, micro_batches: int) -> list[int]:
    """The chunk of each forward pass that a stage has done before its first backward pass ends (Narayanan et al. 2021,
    section 2.2): with 1F1B as many as stages from here to the end, interleaved twice the distance and a round a chunk."""
    if layout.virtual == 1:
        return [0] * min(micro_batches, layout.pipeline - stage)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline
    passes = min(warm_up + 1, micro_batches * layout.virtual)
    return [number // layout.pipeline % layout.virtual for number in range(passes)]


def _heights(flying: int, passes: int, gradients: int, kept: int) -> list[tuple[int, int]]:
    """(passes in flight, bytes of gradients) where a backward pass begins: the first finds no gradients yet, unless they
    stay allocated between steps."""
    later = min(flying, passes - 1)
    return [(flying, kept), *([(later, gradients)] if later else [])]


# -- what works for a moment ---------------------------------------------------------------------------------------


def chunk_rows(num_rows: int, num_classes: int) -> int:
    """Rows of logits made at a time: `kernels.cross_entropy.chunk_rows`."""
    return max(1024, 2**26 // (FLOAT * num_classes), -(-num_rows // 16))


def _loss(place: Place) -> int:
    """The hidden states after the last norm and a chunk's logits, less what the loss has not made yet."""
    rows = min(place.predicted, chunk_rows(place.predicted, place.classes))
    several = rows < place.predicted
    matrix = place.classes * place.model.hidden_size
    states = place.element * place.predicted * place.model.hidden_size
    unmade = 0 if several else states + place.element * matrix
    return states + rows * place.classes * LOGIT_BYTES - unmade


def _dropping(place: Place) -> int:
    """The dropout of the last layer's attention probabilities, less what is not made yet when it is at work."""
    model, length, layer = place.model, place.config.data.seq_length, place.chunks[-1][-1]
    if not model.attention_dropout_rate:
        return 0
    block = max(64, -(-length // 4)) if model.causal or model.window(layer) is not None else length
    heads = model.num_heads // place.layout.tensor // place.layout.context
    made = DROPOUT_BYTES * place.config.batch.micro_size * heads * block * length
    later = saved_by_layer(place, layer) - norm_saved(place) - place.hidden + (_final(place) if place.last else 0)
    return made - later


def _backward(place: Place) -> int:
    """The loss's gradients multiplied by their factor, or those inside a layer; a recomputed layer's activations."""
    model, layer = place.model, place.chunks[-1][-1]
    matrix = place.classes * model.hidden_size * place.element
    head = place.element * place.predicted * model.hidden_size + matrix if place.last else 0
    inside = 2 * place.residual + place.element * (place.rows * _up(place) + _up(place) * model.hidden_size)
    if place.config.parallel.recompute == "full":
        inside += _whole_layer(place, layer, selective=False)
    elif place.config.parallel.recompute == "selective":
        inside += attention_saved(place, layer) - attention_inputs(place)
    return max(head, inside)
