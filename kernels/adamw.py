"""AdamW (Loshchilov and Hutter 2019) over many tensors at once: clipping, skipped steps and low-precision copies in its pass.

The masters are float32, the moments float32 or bfloat16, gradients of any float type. Nothing is read back from the device:
whether an update is applied, by what its gradients are divided and how many have been applied are values there.

    optimizer.bound(norm, clip_norm)    # one update begins: clip by this norm; where it is not finite, nothing changes
    optimizer.step()                    # once, or group by group as DeepSpeed does it: all of this update

Without `bound` every step is an update of its own, unclipped and always applied.

Backends: `torch`, its fused step, which is the CPU's path and the reference; `triton`, one launch over a table of addresses
(`kernels.adamw_triton`). They differ by the rounding of their sums.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.available import Wish, choose, no_triton

MOMENTS = ("exp_avg", "exp_avg_sq")
NARROW_MOMENTS = 2.0**-6  # the least 1 - beta that bfloat16 can follow: see AdamW
NORM_PART = 2**16  # elements: torch's float32 norm of three million on a CPU is wrong in the fifth digit
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Bound(NamedTuple):
    """What an update's gradients are divided by and whether it is left out, both (), float32, on the device."""

    divisor: Tensor | None
    skipped: Tensor


class Batch(NamedTuple):
    """Tensors of like numbers, types and device, which one launch updates; lists of one length (copies: or of none)."""

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    masters: list[Tensor]
    gradients: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    copies: list[Tensor]
    decays: list[float]


class AdamW(torch.optim.Optimizer):
    """State of a parameter: exp_avg and exp_avg_sq, of its shape. The count of applied updates is one for all.

    moments: their type. A bfloat16 moment is off by at most 2^-8 / (1 - beta) of the largest that it has been, since
    each update rounds it once; a beta for which that exceeds a quarter is refused. copies: low-precision tensors that a
    step leaves equal to their masters, `copies[master] = tensor`. backend: `auto` is Triton on a GPU (where there is
    none, torch with a warning that says why) and torch on a CPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: torch.dtype = torch.float32,
        backend: Wish = "auto",
    ) -> None:
        _check(lr, betas, eps, weight_decay, moments, backend)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments, self.backend = moments, backend
        self.copies: dict[Tensor, Tensor] = {}
        self.launches = 0  # of the step's own kernel, torch's or Triton's
        self.leaves_out = False  # the next update that begins changes nothing, whatever its norm
        self._chosen: dict[torch.device, types.ModuleType | None] = {}
        self._tables: dict[tuple[int, ...], Any] = {}
        self._count: Tensor | None = None
        self._restart()
        self._kernels(self._device())  # an impossible backend is refused here, not at the first step

    def start_state(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Moments of zero and no updates, so that loading can write into them; parameters: all that it has."""
        for parameter in self._parameters() if parameters is None else parameters:
            self._start(parameter)
        self._count = None
        self._restart()

    @property
    def updates(self) -> int:
        """Applied updates, which the bias correction counts; read back from the device."""
        return 0 if self._count is None else int(self._count.item())

    @updates.setter
    def updates(self, count: int) -> None:
        self._counter().fill_(count)

    @torch.no_grad()
    def bound(self, norm: Tensor, clip_norm: float) -> Tensor:
        """Begin an update: clip by this gradient norm (by none where clip_norm is 0), or change nothing where it is not
        finite, or `leaves_out` was set: masters, moments and count. Returns whether it is applied, (), bool."""
        norm = norm.to(self._device())  # it may lie on the device while DeepSpeed keeps the optimizer on the host
        finite = norm.isfinite() & (not self.leaves_out)
        self.leaves_out = False
        divisor = ((norm + 1e-6) / clip_norm).clamp(min=1.0).to(torch.float32) if clip_norm > 0 else None
        self._restart(Bound(divisor, (~finite).to(torch.float32)))
        return finite

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient. Raises RuntimeError for one that this update has had already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._count_update()
        for batch in self._batches():
            kernels = self._kernels(batch.masters[0].device)
            if kernels is None:
                _torch_step(batch, self._counter(), self._bound)
            else:
                kernels.step(self._table(kernels, batch), batch, self._counter(), self._bound)
            self.launches += 1
        return loss

    def square_sum(self, gradients: Sequence[Tensor]) -> Tensor:
        """(), float64: the sum of the squares of these of its parameters' gradients; the same bits for the same numbers."""
        kernels = self._kernels(self._device())
        if kernels is None:
            return square_sum(gradients)
        wanted, sums = set(map(id, gradients)), []
        for batch in self._batches():
            counted = [id(master.grad) in wanted for master in batch.masters]
            wanted.difference_update(id(master.grad) for master in batch.masters)
            sums.append(kernels.square_sum(self._table(kernels, batch), batch, counted))
        assert not wanted, "gradients that are no parameter's of this optimizer"
        return torch.stack(sums).sum()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        updates = state_dict["updates"]
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for state in self.state.values():  # which torch gave the parameters' type
            state.update({name: state[name].to(self.moments) for name in MOMENTS})
        self._count = None
        self.updates = updates
        self._restart()

    # -- what a step works on ----------------------------------------------------------------------------------------

    def _restart(self, bound: Bound | None = None) -> None:
        self._bound = bound
        self._moved: set[int] = set()  # parameters that the update has had

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _device(self) -> torch.device:
        return next((p.device for p in (*self._parameters(), *self.state)), torch.device("cpu"))

    def _counter(self) -> Tensor:
        if self._count is None:
            self._count = torch.zeros((), dtype=torch.float32, device=self._device())
        return self._count

    def _start(self, parameter: Tensor) -> None:
        self.state[parameter] = {name: torch.zeros_like(parameter, dtype=self.moments) for name in MOMENTS}

    def _count_update(self) -> None:
        """Once an update, whether its groups come one by one or together."""
        moving = {id(parameter) for parameter in self._parameters() if parameter.grad is not None}
        if self._bound is None:
            self._counter().add_(1)
        elif self._moved & moving:
            raise RuntimeError("AdamW was stepped again under the same bound: call bound() before every update")
        elif not self._moved:
            self._counter().add_(1 - self._bound.skipped)
        self._moved |= moving if self._bound is not None else set()

    def _batches(self) -> list[Batch]:
        found: dict[tuple[Any, ...], Batch] = {}
        for group in self.param_groups:
            numbers = (group["lr"], group["betas"], group["eps"])
            for master in group["params"]:
                gradient, copy = master.grad, self.copies.get(master)
                if gradient is None:
                    continue
                _check_tensors(master, gradient, copy)
                if master not in self.state:
                    self._start(master)
                key = (*numbers, master.device, gradient.dtype, None if copy is None else copy.dtype)
                batch = found.setdefault(key, Batch(*numbers, [], [], [], [], [], []))
                batch.masters.append(master)
                batch.gradients.append(gradient.contiguous())
                batch.averages.append(self.state[master]["exp_avg"])
                batch.squares.append(self.state[master]["exp_avg_sq"])
                batch.copies.extend(() if copy is None else (copy,))
                batch.decays.append(group["weight_decay"])
        return list(found.values())

    def _kernels(self, device: torch.device) -> types.ModuleType | None:
        """The Triton launches, or None for torch's fused step: decided once a device."""
        if device not in self._chosen:
            self._chosen[device] = _choose(self.backend, device)
        return self._chosen[device]

    def _table(self, kernels: types.ModuleType, batch: Batch) -> Any:
        return self._tables.setdefault(tuple(map(id, batch.masters)), kernels.Table()).point(batch)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """(), float64: the sum of the squares of the tensors' elements, by torch: in float32 over parts, over these in float64."""
    parts = [part for tensor in tensors for part in tensor.reshape(-1).split(NORM_PART)]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(list(torch._foreach_norm(parts, 2, torch.float32))).double().square().sum()


def _choose(wish: Wish, device: torch.device) -> types.ModuleType | None:
    try:
        backend, reason = choose(wish, device, lambda: no_triton(device))
    except ValueError as error:
        raise ValueError(f"AdamW: {error}") from None
    if reason:
        warnings.warn(f"AdamW runs torch's fused step on {device}, not its Triton kernels: {reason}", stacklevel=3)
    if backend == "torch":
        return None
    from kernels import adamw_triton  # which imports triton

    return adamw_triton


def _torch_step(batch: Batch, count: Tensor, bound: Bound | None) -> None:
    """torch's own fused step, which takes one type for all: others are widened for it and rounded again."""
    gradients, averages, squares = map(_widened, (batch.gradients, batch.averages, batch.squares))
    for decay in dict.fromkeys(batch.decays):
        chosen = [index for index, found in enumerate(batch.decays) if found == decay]
        torch._fused_adamw_(
            [batch.masters[index] for index in chosen],
            [gradients[index] for index in chosen],
            [averages[index] for index in chosen],
            [squares[index] for index in chosen],
            [],
            [count] * len(chosen),
            amsgrad=False,
            lr=batch.learning_rate,
            beta1=batch.betas[0],
            beta2=batch.betas[1],
            weight_decay=decay,
            eps=batch.epsilon,
            maximize=False,
            grad_scale=None if bound is None else bound.divisor,
            found_inf=None if bound is None else bound.skipped,
        )
    if averages is not batch.averages:
        torch._foreach_copy_([*batch.averages, *batch.squares], [*averages, *squares])
    if batch.copies:
        torch._foreach_copy_(batch.copies, batch.masters)


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if tensors[0].dtype == torch.float32 else [tensor.float() for tensor in tensors]


def _check(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: torch.dtype,
    backend: str,
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"AdamW's {name} is 0 or more, found {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"AdamW's betas are in [0, 1), found {betas}")
    if moments not in (torch.float32, torch.bfloat16):
        raise ValueError(f"AdamW's moments are float32 or bfloat16, found {moments}")
    if moments == torch.bfloat16 and any(1 - beta < NARROW_MOMENTS for beta in betas):
        raise ValueError(
            f"bfloat16 moments lose updates smaller than 2^-8 of them, so betas may be up to {1 - NARROW_MOMENTS}; "
            f"found {betas}. Use float32 moments or smaller betas"
        )
    if backend not in get_args(Wish):
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(get_args(Wish))}")


def _check_tensors(master: Tensor, gradient: Tensor, copy: Tensor | None) -> None:
    """ValueError for what no backend can step."""
    if master.dtype != torch.float32 or not master.is_contiguous():
        raise ValueError(f"AdamW steps contiguous float32 masters, found {master.dtype} of strides {master.stride()}")
    if gradient.is_sparse or gradient.dtype not in FLOATS or gradient.shape != master.shape:
        raise ValueError(f"AdamW takes dense gradients of {FLOATS}, shaped as their masters, found {gradient.dtype}")
    if copy is not None and (copy.shape != master.shape or not copy.is_contiguous() or copy.dtype not in FLOATS):
        raise ValueError(f"a copy is contiguous, of {FLOATS}, shaped as its master {tuple(master.shape)}")
