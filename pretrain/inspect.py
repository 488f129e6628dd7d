"""What a run, a folder of shards or a config's data hold, for people: `python -m pretrain inspect`.

A run is told of here, data in `pretrain.data.inspecting`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.config.folder import CONFIG
from pretrain.data import manifest as manifests
from pretrain.data.remote.addresses import parse_address
from pretrain.errors import UserError
from pretrain.finetuning.opening import run_labels, task_of
from pretrain.metrics import read_metrics
from pretrain.printable import printable
from pretrain.runs import run_config, run_tokenizer
from pretrain.sizes import Sizes, parameters_of
from pretrain.vocabulary import vocabulary_of

OF_DATA = ("sample", "config", "verify", "json")  # options that a run's folder has no use for


def main(args: Namespace) -> int:
    """Tell of a run's folder, a folder of shards or a config file, whichever it is. Returns 1 where something is damaged.
    Raises UserError where it is none of them."""
    from pretrain.data.inspecting import command

    path: Path | str = args.path if parse_address(args.path) else Path(args.path)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if (
        isinstance(path, str)
        or (path / manifests.NAME).is_file()
        or (path.is_file() and path.suffix in (".yaml", ".yml"))
    ):
        return command.main(path, args, console)
    if (path / CONFIG).is_file():
        for name in OF_DATA:
            if getattr(args, name):
                raise UserError(f"--{name}: {path} is a run's folder; name a folder of shards, such as shards/train")
        return _run(path, console)
    parts = [str(part.parent) for part in sorted(path.glob(f"*/{manifests.NAME}"))]
    hint = f"; there are shards in {', '.join(parts)}" if parts else ""
    raise UserError(
        f"{printable(str(path))}: neither a run's folder ({CONFIG}) nor a folder of shards ({manifests.NAME}) nor a config "
        f"file{hint}"
    )


def _run(path: Path, console: Console) -> int:
    from pretrain import checkpoint  # imports torch, which shards do without

    config, tokenizer = run_config(path), run_tokenizer(path)
    vocabulary = vocabulary_of(config, tokenizer)
    shape = Sizes(vocabulary.size)
    if config.objective.is_task:
        task = task_of(config, tokenizer, vocabulary, run_labels(path))
        shape = Sizes(vocabulary.size, task.num_outputs, task.num_rows)
    count = parameters_of(config, shape)
    console.print(f"{path}: {config.model.kind}, {count:,} parameters, {config.precision.compute}, {_last(path)}")
    table = Table("step", "validation loss", "size", "written by", "hashes")
    losses = {line["step"]: line.get("validation_loss") for line in read_metrics(path)}
    damaged: list[str] = []
    for step in checkpoint.list_steps(path):
        loss = "" if losses.get(step) is None else f"{losses[step]:.4f}"
        try:
            found = checkpoint.open_checkpoint(checkpoint.folder_of(path, step))
        except UserError as error:
            damaged.append(f"step {step:,}: {error}")
            table.add_row(f"{step:,}", loss, "", "", "damaged")
            continue
        writer, size = str(found.about.get("layout")), f"{found.bytes / 2**20:,.1f} MiB"
        table.add_row(f"{step:,}", loss, size, writer, f"{len(found.files)} match")
    console.print(table)
    console.print(*damaged, sep="\n", end="\n" if damaged else "")
    return 1 if damaged else 0


def _last(path: Path) -> str:
    lines = [line for line in read_metrics(path) if line.get("loss") is not None]
    return f"step {lines[-1]['step']:,}, loss {lines[-1]['loss']:.4f}" if lines else "no step logged yet"
