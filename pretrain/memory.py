"""Peak memory of one rank, from the config and the layout alone. Imports no torch.

What is alive on a rank, in bytes:
- states: weights, masters, moments and gradients, and ZeRO's shares of these (Rajbhandari et al. 2020, sections 3 and 5);
- activations that the backward pass needs, of every micro-batch that is in flight (Korthikanti et al. 2022, section 4;
  Narayanan et al. 2021, section 2.2), see `pretrain.activations`;
- what works for a moment: the logits of a chunk, gradients of activations, buckets of a reduction.

Three moments can be the highest: the last stage's loss, the start of a backward pass, the optimizer's step. Eager
execution is what is counted; a compiled layer keeps less. What each product's own workspace takes, the libraries and the
communication's buffers are left out.

Symbols: P parameters on this rank, B sequences of a micro-batch, S sequence, H hidden, V vocabulary, D head size, t tensor
and c context ranks. r = B S / c rows of this context rank, s those between the layers (r / t under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from parallel.layout import Layout
from pretrain.activations import (
    ALL_LEARN,
    FLOAT,
    Frozen,
    Place,
    attention_inputs,
    attention_saved,
    embedding,
    exchanged,
    final,
    norm_saved,
    saved_by_layer,
    whole_layer,
)
from pretrain.config.model import GATED, layer_parameters, lora_parameters, pooler_parameters
from pretrain.config.run import Config

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
    sequences a step over all ranks, the config's unless given; frozen: of the rank (`pretrain.trainable.frozen_on`). Of
    several phases the highest. precision.compute must be decided."""
    if config.data.phases:
        each = (memory(phase, layout, layers, vocab_size, stage, size, frozen) for phase in config.phases)
        return max(each, key=lambda found: found.peak)
    place = replace(_place(config, layout, layers, vocab_size, stage), frozen=frozen)
    micro_batches = (size or config.batch.size) // layout.data // config.batch.micro_size
    states = _states(place)
    states = states._replace(weights=states.weights + _mixed(place))
    begin = frozen.blocks if place.first else 0  # what a stage receives has a gradient in any case
    held = [sum(saved_by_layer(place, layer) for layer in chunk) for chunk in place.chunks]
    held[0] = sum(saved_by_layer(place, layer) for layer in place.chunks[0] if layer >= begin)
    held[0] += embedding(place) if place.first and not frozen.blocks else 0
    held[-1] += final(place) if place.last else 0
    held = [bytes + (exchanged(place) if layout.pipeline > 1 else 0) for bytes in held]
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
    norm = model.hidden_size * (2 if biased and model.norm == "layer" else 1)

    def of_layer(cross: bool) -> int:  # norms and row biases are not cut
        uncut = whole + (norm + biased * model.hidden_size if cross else 0)
        return (layer_parameters(model, cross) - uncut) // tensor + uncut + lora_parameters(model, tensor, cross)

    count = sum(of_layer(layer >= model.num_layers) for chunk in place.chunks for layer in chunk)
    matrix = place.classes * model.hidden_size
    ends = [place.first, place.last] if not model.tie_embeddings else [place.first or place.last]
    count += matrix * (sum(ends) if not place.config.objective.has_head else place.first)
    stacks = len(place.config.lengths)
    if place.first:
        learned = model.positions == "learned"
        longest = max(model.max_positions or 0, *(length for _, length in place.config.lengths))
        table = stacks * longest if learned else 0
        count += (table + model.num_segments) * model.hidden_size + (stacks * norm if model.has_embedding_norm else 0)
    if model.norm_position == "pre":
        norms_after = {model.num_layers - 1, model.total_layers - 1}
        count += norm * sum(layer in norms_after for chunk in place.chunks for layer in chunk)
    if place.last and model.kind == "bert":
        count += _encoder_head(place, norm)
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
        masters = 0 if element == FLOAT and not place.config.optimizer.mixout else FLOAT * count
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


def _mixed(place: Place) -> int:
    """What mixout keeps: the layers' matrices as they began, and a byte an element for their masks."""
    if not place.config.optimizer.mixout:
        return 0
    matrices = layer_parameters(place.model.model_copy(update={"biases": False})) - 2 * place.model.hidden_size
    return (place.element + 1) * sum(map(len, place.chunks)) * matrices // place.layout.tensor


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
    layer = place.chunks[-1][-1]
    place = place.at(layer)
    model, length = place.model, place.length
    if not model.attention_dropout_rate:
        return 0
    local = layer - (model.num_layers if place.of_memory else 0)
    block = max(64, -(-length // 4)) if place.causal or model.window(local) is not None else length
    heads = model.num_heads // place.layout.tensor // place.layout.context
    made = DROPOUT_BYTES * place.config.batch.micro_size * heads * block * length
    later = saved_by_layer(place, layer) - norm_saved(place) - place.hidden + (final(place) if place.last else 0)
    return made - later


def _backward(place: Place) -> int:
    """The loss's gradients multiplied by their factor, or those inside a layer; a recomputed layer's activations."""
    layer = place.chunks[-1][-1]
    place, model = place.at(layer), place.model
    matrix = place.classes * model.hidden_size * place.element
    head = place.element * place.predicted * model.hidden_size + matrix if place.last else 0
    inside = 2 * place.residual + place.element * (place.rows * _up(place) + _up(place) * model.hidden_size)
    if place.config.parallel.recompute == "full":
        inside += whole_layer(place, layer, selective=False)
    elif place.config.parallel.recompute == "selective":
        inside += attention_saved(place, layer) - attention_inputs(place)
    return max(head, inside)
