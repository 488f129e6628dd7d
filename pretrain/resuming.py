"""Whether a run may go on from a checkpoint: what it was trained with must still be there."""

from __future__ import annotations

from pretrain.checkpoint import Checkpoint
from pretrain.config.run import Config
from pretrain.errors import UserError


def check(found: Checkpoint, config: Config, data: str, mixed_with: str | None) -> None:
    """data: the fingerprint of the run's; mixed_with: the digest of the initial weights, where mixout still needs them.

    Raises UserError for other data or other weights.
    """
    if found.about.get("data") != data:
        raise UserError(
            f"{found.folder}: was trained on other data than {', '.join(config.data.train_folders)} "
            "(or another validation set); put back the shards it knows, or give another run.dir to start anew"
        )
    if mixed_with is not None and found.about.get("initial") != mixed_with:
        raise UserError(
            f"{found.folder}: was mixed with other weights than {config.model.initial} has now; put back that model as it "
            "was, or give another run.dir to start anew"
        )


def other_kernels(found: Checkpoint, kernels: str) -> str:
    """A warning where others computed before; else empty."""
    before = found.about.get("kernels", kernels)
    if before == kernels:
        return ""
    return (
        f"step {found.state.step} was trained with the kernels {before}; from here with {kernels}: the losses agree within "
        "rounding, not bit for bit"
    )
