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
    return deepspeed
