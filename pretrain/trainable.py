"""Which weights learn, by the canonical names of logical tensors: all but what `optimizer.freeze` names, and with LoRA its
factors and the heads alone.

A weight that does not learn has no gradient, no optimizer state and no decay. It is in checkpoints and exports as all others.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch

from parallel.adapters import FACTORS
from parallel.layers import Parts
from parallel.layout import Layout, Problem
from parallel.logical import canonical
from parallel.stages import Stage, cuts, parameter_paths
from pretrain.activations import Frozen
from pretrain.config.load import problem_error
from pretrain.config.model import ModelConfig
from pretrain.config.run import Config
from pretrain.models.make import make_model
from pretrain.sizes import Sizes

HEADS = ("task_head", "pooler", "transform", "pair_head")  # that learn with LoRA
BOTTOM = ("embedding", "positions", "segments", "embedding_norm")  # below the blocks
FIELD = "optimizer.freeze"

Tensors = dict[str, tuple[int, ...]]  # shapes of logical tensors by name
Products = list[Tensors]  # of each parameter, which may hold several logical tensors as one product


def frozen_weights(config: Config, shape: Sizes) -> Tensors:
    """Those that do not learn. Raises UserError with all that is wrong with the names."""
    if not config.optimizer.freeze and config.model.lora is None:
        return {}
    products = _products(config, shape)
    every = {name: size for product in products for name, size in product.items()}
    frozen = {name: size for name, size in every.items() if is_frozen(name, config)}
    problems = [*_unmatched(config, every), *_untargeted(config, every), *_split(products, frozen)]
    if len(frozen) == len(every):
        problems.append(Problem(FIELD, "nothing is left to learn", "leave out what is to be trained"))
    if problems:
        raise problem_error("these weights cannot be frozen", problems)
    return frozen


def check_trainable(config: Config, shape: Sizes, layout: Layout, layers: list[int]) -> None:
    """Raises UserError for names that are wrong, and for a layout under which a rank would have no weight that learns and
    yet share the optimizer. layers: of each part of the pipeline (`pretrain.build.stage_layers`)."""
    if problems := list(_mixout_problems(config, layout)):
        raise problem_error("mixout cannot be", problems)
    frozen = frozen_weights(config, shape)
    shared = layout.zero > 0 and layout.data * layout.context > 1
    for stage in range(layout.pipeline if shared and frozen else 0):
        parts = (
            _products(config, shape, cut.layers, cut.first, cut.last) for cut in cuts(layers, layout.pipeline, stage)
        )
        if all(name in frozen for products in parts for product in products for name in product):
            message = f"stage {stage + 1} of {layout.pipeline} has no weight that learns, of which ZeRO could share out"
            mend = "set parallel.zero: 0, give that stage further layers by parallel.layers, or lower parallel.pipeline"
            raise problem_error("the layout does not fit this run", [Problem("optimizer.freeze", message, mend)])


def layer_of(name: str, model: ModelConfig) -> int | None:
    """The block that a weight is of, counted through the model, a decoder's behind its encoder's; -1: below all blocks,
    None: above them."""
    parts = name.split(".")
    if "blocks" in parts:
        below = model.num_layers if parts[0] == "decoder" else 0
        return below + int(parts[parts.index("blocks") + 1])
    return -1 if any(part in BOTTOM for part in parts) else None


def frozen_on(stages: Sequence[Stage], model: ModelConfig) -> Frozen:
    """Of this rank's stages, as the memory formula takes it."""
    names = parameter_paths(stages)
    still = (parameter.local_shape for parameter in names if not parameter.requires_grad)  # type: ignore[attr-defined]
    elements = sum(map(math.prod, still))
    learning = [layer_of(path, model) for parameter, path in names.items() if parameter.requires_grad]
    lowest = min((layer for layer in learning if layer is not None), default=model.total_layers)
    return Frozen(elements, max(lowest, 0) if stages[0].cut.first else 0)


def is_frozen(name: str, config: Config) -> bool:
    """Whether the logical tensor of that name does not learn."""
    wished, first = config.optimizer.freeze, name.split(".")[0]
    if config.model.lora is not None and not name.endswith(FACTORS) and first not in HEADS:
        return True
    if isinstance(wished, list):
        return any(_matches(name, pattern) for pattern in wished)
    layer = layer_of(name, config.model)
    return wished > 0 and layer is not None and layer < wished


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _products(
    config: Config, shape: Sizes, layers: range | None = None, first: bool = True, last: bool = True
) -> Products:
    """Of the model, or of a part of it, whatever tensor parallelism cuts."""
    with torch.device("meta"):
        model = make_model(config, Parts(), shape, layers, first, last)
    return [
        {canonical(path, piece): piece.shape for piece in parameter.pieces}  # type: ignore[attr-defined]
        for path, parameter in model.named_parameters()
    ]


# -- what is wrong with the names ------------------------------------------------------------------------------------


def _unmatched(config: Config, names: Tensors) -> Iterator[Problem]:
    wished = config.optimizer.freeze
    if isinstance(wished, int):
        if wished > config.model.total_layers:
            mend = f"give up to {config.model.total_layers}"
            yield Problem(FIELD, f"{wished} layers, but the model has {config.model.total_layers}", mend)
        return
    for pattern in wished:
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, _prefixes(names), n=3, cutoff=0.4)
            mend = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(_heads(names))}"
            yield Problem(FIELD, f"no weight has the name {pattern!r:.60}", mend)


def _untargeted(config: Config, names: Tensors) -> Iterator[Problem]:
    for target in () if config.model.lora is None else config.model.lora.targets:
        if not any(name.endswith(f".{target}{FACTORS[0]}") for name in names):
            message = f"there is no {target!r} in a feed-forward layer of {config.model.activation}"
            yield Problem("model.lora.targets", message, "remove it, up is its first product")


def _prefixes(names: Tensors) -> list[str]:
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(words[:length]) for words in parts for length in range(1, len(words) + 1)))


def _heads(names: Tensors) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def _mixout_problems(config: Config, layout: Layout) -> Iterator[Problem]:
    if not config.optimizer.mixout:
        return
    if config.model.initial is None or config.model.reset == "all":
        yield Problem(
            "optimizer.mixout", "there are no trained weights to mix with", "name a model.initial, or remove it"
        )
    if config.model.lora is not None:
        yield Problem("optimizer.mixout", "has no effect with model.lora, whose layers do not learn", "remove one")
    if layout.zero == 3 and (layout.data * layout.context > 1 or layout.offload):
        found = "ZeRO-3 has no rank's weights whole when a step begins"
        yield Problem("optimizer.mixout", found, "set parallel.zero: 2")


def _split(products: Products, frozen: Tensors) -> Iterator[Problem]:
    """Logical tensors that are computed in one product learn together."""
    for product in products:
        held, learning = ([name for name in product if (name in frozen) == wanted] for wanted in (True, False))
        if held and learning:
            message = f"{', '.join(held)} in one product with {', '.join(learning)}"
            yield Problem(FIELD, message, "freeze all of these or none")
            return
