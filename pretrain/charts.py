"""Where TensorBoard shows what: the tag of each number, and the charts that stand first.

TensorBoard sorts groups of tags by their names and opens the first two, so names are chosen for their order too:

    loss/        train, validation, each of their terms where there are several, bits_per_byte
    optimizer/   grad_norm, learning_rate, batch_size, epochs; of several phases seq_length
    scores/      of validation: accuracies, a task's metrics
    sources/     of named sources, a curve each: tokens and epochs seen, validation loss and bits_per_byte of each one's own
    speed/       tokens_per_second (of labelled examples examples_per_second), step_seconds, data_wait_seconds; mfu and hfu
                 where the device's peak is known
    system/      memory_gibibytes, checkpoint_stall_seconds, checkpoint_write_seconds
    timeline/    of each of EVENTS, how often it has happened so far: a step up where it did. (TensorBoard smooths curves
                 and cuts outliers off, which hides a single 1 among zeros.)
    weight_norm/, weight_gradient_norm/    a layer or a weight each, see `pretrain.gauges`

Texts likewise: happened/ (the timeline in words), samples, settings (the config), tokens/ (of the attention maps).

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

FOLDER = "tensorboard"  # in a run's folder
VALIDATION, TRAINING = "loss/validation", "loss/train"
EVENTS = ("checkpoint", "resume", "rewind", "skip", "spike")
MIXTURE = "mixture"  # the event of named sources: their shares change
TAGS = {
    "loss": TRAINING,
    "validation_loss": VALIDATION,
    "bits_per_byte": "loss/bits_per_byte",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "batch_size": "optimizer/batch_size",
    "seq_length": "optimizer/seq_length",
    "epochs": "optimizer/epochs",
    "tokens_per_second": "speed/tokens_per_second",
    "examples_per_second": "speed/examples_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_wait_seconds",
    "mfu": "speed/mfu",
    "hfu": "speed/hfu",
    "memory_gibibytes": "system/memory_gibibytes",
    "checkpoint_stall_seconds": "system/checkpoint_stall_seconds",
    "checkpoint_write_seconds": "system/checkpoint_write_seconds",
}

Layout = dict[str, dict[str, tuple[str, list[str]]]]  # category -> chart -> its kind and what its tags begin with


def tag_of(name: str) -> str | None:
    """A field's place in a group; None where it has none."""
    if name in TAGS:
        return TAGS[name]
    if name.endswith("_loss"):
        return f"loss/{name.removesuffix('_loss')}"
    if name.startswith("validation_") and name != "validation_targets":
        return f"scores/{name.removeprefix('validation_')}"
    return None


def source_tags(sources: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """What is known of each named source, by its tag: one group a measure, so that sources lie in one chart."""
    return {
        f"sources/{measure}/{name}": value
        for name, found in sources.items()
        for measure, value in found.items()
        if value is not None
    }


def layout(scores: bool, norms: bool, sources: bool = False) -> Layout:
    """The charts of the page "custom scalars". scores: a validation gives some; norms: those of weights are watched; sources: of
    the data have names."""
    overview = {
        "loss: training and validation": [f"{TRAINING}$", f"{VALIDATION}$"],
        **({"validation scores": ["scores/"]} if scores else {}),
        "learning rate": ["optimizer/learning_rate$"],
        "gradient norm": ["optimizer/grad_norm$"],
        "speed (tokens or examples a second)": [r"speed/\w+_per_second$"],
        "seconds a step, and of these waiting for data": ["speed/step_seconds$", "speed/data_wait_seconds$"],
        "memory (GiB)": ["system/memory_gibibytes$"],
        "breaks so far: a step up where one was": ["timeline/(?!checkpoint|mixture)"],
        "checkpoints so far": ["timeline/checkpoint$"],
    }
    weights = {
        "norms of gradients": ["weight_gradient_norm/"],
        "norms of weights": ["weight_norm/"],
    }
    named = {
        "epochs of each source": ["sources/epochs/"],
        "validation loss of each source": ["sources/validation_loss/"],
        "changes of their shares so far": ["timeline/mixture$"],
    }
    charts = {
        "overview": overview,
        **({"sources": named} if sources else {}),
        **({"layers": weights} if norms else {}),
    }
    return {category: {chart: ("Multiline", tags) for chart, tags in of.items()} for category, of in charts.items()}
