"""The mean of the gradients over the data-parallel replicas, on its way while the backward pass still runs.

Gradients are joined into flat buckets, from the last layer to the first, as the backward pass makes them. In the backward
pass of a step's last micro-batch, the one after which nothing more is added, a bucket is sent as soon as all of its
gradients are there (Li et al. 2020, "PyTorch Distributed", section 3.2.3). `finish` sends what is left and waits for all.

Always: every replica sends the same buckets in the same order, whatever order its gradients come in, since collectives
are paired by their order; and a bucket's contents do not depend on timing, so that a run can be repeated bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from parallel.gradients import accumulated

BUCKET = 2**23  # elements a reduction, 32 MiB: large enough to fill a link, small enough that the first starts early

Bucket = list[nn.Parameter]


def buckets_of(parameters: Iterable[nn.Parameter]) -> Iterator[Bucket]:
    """Runs of up to BUCKET elements; a larger parameter is alone."""
    bucket: Bucket = []
    filled = 0
    for parameter in parameters:
        if bucket and filled + parameter.numel() > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    if bucket:
        yield bucket


def join(bucket: Bucket) -> Tensor:
    """The bucket's gradients in one flat tensor; from now on they are views of it."""
    gradients = accumulated(bucket)
    flat = _flatten_dense_tensors(gradients)
    for parameter, part in zip(bucket, _unflatten_dense_tensors(flat, gradients), strict=True):
        if getattr(parameter, "_hp_grad", None) is not None:
            parameter._hp_grad = part  # type: ignore[attr-defined]
        else:
            parameter.grad = part
    return flat


class Averaging:
    """Averages the gradients of one step after the other over a group of replicas.

    Entered as a context, backward passes only accumulate: another one of the same step follows. (megatron-core leaves the
    context open where it runs no backward pass; a generator's would then be closed whenever that is collected.)
    """

    def __init__(self, buckets: Sequence[Bucket], group: Any, flat: Callable[[Bucket], Tensor] = join) -> None:
        """buckets: of parameters whose gradients accumulate in `parallel.gradients.main_gradient`, in the order in which
        the backward pass makes them; flat: a bucket's gradients as one tensor whose changes are theirs.

        Hooks that move a gradient elsewhere (into float32) must have been registered before.
        """
        self.buckets, self.group, self.flat = buckets, group, flat
        self.size = dist.get_world_size(group)
        self.number_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        self.accumulating = False
        self._begin()
        if self.size > 1:
            for parameter in self.number_of:
                parameter.register_post_accumulate_grad_hook(self._ready)

    def _begin(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, Any]] = []

    def __enter__(self) -> None:
        self.accumulating = True

    def __exit__(self, *error: object) -> None:
        self.accumulating = False

    def _ready(self, parameter: nn.Parameter) -> None:
        if self.accumulating:
            return
        number = self.number_of[parameter]
        assert self.missing[number], (
            "a gradient was added to after it had been sent: wrap all backward passes but the last"
        )
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        flat = self.flat(self.buckets[len(self.sent)])
        self.sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Make every gradient the mean over the replicas."""
        if self.size == 1:
            return
        while len(self.sent) < len(self.buckets):
            self._send()
        for flat, work in self.sent:
            work.wait()
            flat /= self.size
        self._begin()
