"""DeepSpeed, imported when it is first needed: quiet, without a launcher, and on a CPU without a compiler."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import Any

import torch
import torch.distributed as dist


def deepspeed() -> Any:
    """The package, its communication over the torch.distributed that is initialised here."""
    package = import_deepspeed(torch.cuda.is_available())
    if not package.comm.is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):
            package.comm.init_distributed(dist.get_backend(), dist_init_required=False)
    return package


def import_deepspeed(cuda: bool) -> Any:
    """Its logging quiet and, on a CPU, without the operator that it would compile at first use."""
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed refuses to start where it is missing
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not cuda:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    _leave_norms_on_the_device()
    return deepspeed


def _leave_norms_on_the_device() -> None:
    """DeepSpeed 0.19.8 asks at every step whether the gradient norm is finite, and skips the step if not; to ask is to
    wait for the device. Our optimizer leaves such a step out by itself (`AdamW.bound`)."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage_1_and_2, stage3):
        assert callable(module.is_invalid_grad_norm)
        module.is_invalid_grad_norm = lambda norm: False
