"""What a run takes of each of its training sources: shares of the samples, tokens and epochs over the whole run."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from pretrain.config.run import Config
from pretrain.data.mixture import Mixture
from pretrain.data.order import Order
from pretrain.data.sources import Sources
from pretrain.data.stream import Stream
from pretrain.printable import printable
from pretrain.schedule import Plan


class Share(NamedTuple):
    """Of one source."""

    folder: str  # behind its name, where it has one
    documents: int
    tokens: int  # that it has
    share: float  # of the run's samples
    run_tokens: float  # that the run takes of it
    epochs: float  # passes of the run over it

    def described(self) -> dict[str, Any]:
        return self._asdict()


def shares_of(config: Config, sources: Sources) -> list[Share]:
    """Of each training source, in the config's order (named ones by name), over all phases."""
    plan = Plan(config, sources.train.samples_per_epoch)
    if sources.mixture is not None:
        return _of_named(sources.mixture, sources, plan)
    streams = [stream for stream in sources.phases if isinstance(stream, Stream)]
    taken = [0.0] * len(streams[0].manifests)
    passes = [0.0] * len(taken)
    samples = 0
    for number, stream in enumerate(streams):
        begin = streams[number].begin
        end = streams[number + 1].begin if number + 1 < len(streams) else plan.samples_before(plan.total_steps)
        drawn = max(min(end, plan.samples_before(plan.total_steps)) - begin, 0)
        samples += drawn
        for source, share in enumerate(_of_samples(stream)):
            taken[source] += drawn * share * stream.seq_length
            passes[source] += drawn * share / stream.order.sources[source].samples
    total = sum(taken) or 1.0
    return [
        Share(str(manifest.folder), manifest.documents, manifest.tokens, tokens / total, tokens, epochs)
        for manifest, tokens, epochs in zip(streams[-1].manifests, taken, passes, strict=True)
    ]


def _of_named(mixture: Mixture, sources: Sources, plan: Plan) -> list[Share]:
    seen = mixture.seen(plan.total_steps)
    total = sum(one["tokens"] for one in seen.values()) or 1.0
    streams = [stream for stream in sources.phases if isinstance(stream, Stream)]
    return [
        Share(f"{name} ({manifest.folder})", manifest.documents, manifest.tokens, one["tokens"] / total, **_run(one))
        for (name, one), manifest in zip(seen.items(), streams[-1].manifests, strict=True)
    ]


def _run(seen: dict[str, float]) -> dict[str, float]:
    return {"run_tokens": seen["tokens"], "epochs": seen["epochs"]}


def _of_samples(stream: Stream) -> list[float]:
    """Each source's share of a stream's samples."""
    assert (
        isinstance(stream.order, Order) and stream.order.weights is not None
    )  # held-out data alone are read as they lie
    return [weight / sum(stream.order.weights) for weight in stream.order.weights]


def tell_shares(shares: list[Share], console: Console) -> None:
    table = Table("source", "documents", "tokens", "share", "tokens of the run", "epochs of the run")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in shares:
        numbers = (f"{one.documents:,}", f"{one.tokens:,}", f"{one.share:.2%}", f"{one.run_tokens:,.0f}")
        table.add_row(printable(one.folder), *numbers, f"{one.epochs:.3f}")
    console.print(table)
