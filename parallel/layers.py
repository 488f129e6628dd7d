"""What a model is built from, for one place of the grid.

A model asks its `Parts` for linear layers, embeddings, norms, attention and the loss, and reads as its paper does; whether
a weight is whole or a tensor-parallel share is settled here. Column-parallel layers hold rows of the weight and give a
slice of the output features, row-parallel layers hold columns and sum (Shoeybi et al. 2019, "Megatron-LM", section 3).
With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) the activations between them are cut along the sequence.

Shapes: B batch, S this context rank's sequence (s = S / tensor under sequence parallelism), H hidden, V vocabulary,
N heads, D head size.
At tensor = 1 every layer is plain `F.linear`, so torch.compile sees through.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activation import activate
from kernels.available import Backend as Kernel
from kernels.available import Chosen
from kernels.backends import Backend, Backends, Call, attend
from kernels.norm import add_norm, norm
from kernels.rotary import rotary_pair
from parallel.adapters import LoRA, column_factors, dropped, row_factors
from parallel.axes import ContextAxis, TensorAxis, enter, leave, mark_cut, mark_summed
from parallel.logical import Initial, Piece, describe
from parallel.vocabulary import VocabEmbedding, VocabHead


class Parts:
    """Builds a model's layers for one rank of a tensor-parallel group; the default is the whole model."""

    def __init__(
        self,
        axis: TensorAxis | None = None,
        context: ContextAxis | None = None,
        backends: Backends | None = None,
        kernels: Chosen | None = None,
    ) -> None:
        self.axis, self.context = axis or TensorAxis(), context or ContextAxis()
        self.kernels = Chosen() if kernels is None else kernels
        self.backends = Backends() if backends is None else backends

    # -- layers ------------------------------------------------------------------------------------------------

    def column(
        self, in_features: int, outputs: dict[str, int], bias: bool, std: float, lora: LoRA | None = None
    ) -> ColumnLinear:
        """A projection whose output features are shared out. `outputs` maps the logical tensor's name to its rows:
        `{"q": N * D, "k": G * D, "v": G * D}` is one product that holds three logical tensors; `{"": F}` just one. lora:
        factors of some of these."""
        return ColumnLinear(self.axis, self.context, in_features, outputs, bias, std, lora)

    def row(self, in_features: int, out_features: int, bias: bool, std: float, lora: LoRA | None = None) -> RowLinear:
        """A projection whose input features are shared out: takes a column layer's slice, gives the whole hidden size."""
        return RowLinear(self.axis, self.context, in_features, out_features, bias, std, lora)

    def linear(self, in_features: int, out_features: int, bias: bool, std: float) -> Linear:
        """A small projection that every tensor rank holds whole, of what is the same on all of them."""
        return Linear(in_features, out_features, bias, std)

    def embedding(self, vocab_size: int, hidden_size: int, std: float) -> VocabEmbedding:
        return VocabEmbedding(self.axis, vocab_size, hidden_size, std)

    def head(self, hidden_size: int, vocab_size: int, std: float, bias: bool = False) -> VocabHead:
        return VocabHead(self.axis, hidden_size, vocab_size, std, self.kernels.loss, bias)

    def norm(self, kind: str, hidden_size: int, epsilon: float, bias: bool) -> Norm:
        """kind: "layer" or "rms"."""
        return Norm(self.axis, kind, hidden_size, epsilon, bias, self.kernels.norm)

    def activation(self, name: str) -> Activation:
        """What a column layer takes to apply it to its product."""
        return Activation(name, self.kernels.activation)

    def table(self, rows: int, hidden_size: int, std: float) -> nn.Parameter:
        """A replicated table (learned positions) that is applied to this rank's slice of the sequence."""
        return mark_summed(
            describe(nn.Parameter(torch.empty(rows, hidden_size)), Initial("normal", std), decay=True), self.axis
        )

    @property
    def picked(self) -> Parts:
        """Parts for what `pick` gives: activations that no tensor rank has a slice of."""
        return Parts(replace(self.axis, sequence=False), self.context, self.backends, self.kernels)

    # -- places ------------------------------------------------------------------------------------------------

    def share(self, count: int) -> int:
        """This rank's part of `count` heads or features."""
        assert count % self.axis.size == 0, f"{count} does not divide over {self.axis.size} tensor ranks"
        return count // self.axis.size

    def first(self, count: int) -> int:
        """Where this rank's part of `count` begins."""
        return self.share(count) * self.axis.rank

    def own(self, x: Tensor) -> Tensor:
        """The context rank's slice (B, S, ...) of a whole input (B, S context, ...)."""
        return _slice(x, self.context.size, self.context.rank)

    def first_place(self, length: int) -> int:
        """Where this context rank's `length` positions begin in the whole sequence."""
        return length * self.context.rank

    def first_row(self, rows: int) -> int:
        """Where `rows` activations of this rank begin in the whole sequence: what dropout's coordinates need."""
        if not self.axis.sequence:
            return self.first_place(rows)
        return self.first_place(rows * self.axis.size) + rows * self.axis.rank

    def scatter(self, x: Tensor) -> Tensor:
        """This tensor rank's slice (B, s, ...) of an input (B, S, ...) that needs no gradient."""
        return _slice(x, self.axis.size, self.axis.rank) if self.axis.sequence else x

    def pick(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (B, P, H) of x (B, s, H) at places (B, P) of the whole sequence, the same on every tensor rank; and
        whether they are of this context rank's slice (B, P), float32: they are zero where not."""
        rows = x.shape[1]
        local = places - self.first_row(rows)
        ours = (local >= 0) & (local < rows)
        first = torch.arange(x.shape[0], device=x.device)[:, None] * rows
        flat = x.flatten(0, 1).index_select(0, (first + torch.where(ours, local, 0)).flatten())
        found = flat.view(*places.shape, -1) * ours[..., None].to(x.dtype)
        if self.axis.sequence and self.axis.size > 1:
            from megatron.core.tensor_parallel import mappings

            found = mappings.reduce_from_tensor_model_parallel_region(found, group=self.axis.group)
            local = places - self.first_place(rows * self.axis.size)
            ours = (local >= 0) & (local < rows * self.axis.size)
        return found, ours.float()

    def whole(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Activations (B, P, H) of x (B, s, H) at places (B, P) of the whole sequence, None: at all of them, the same on
        every tensor and context rank. The gradient is the sum of what all context ranks make of it."""
        rows = x.shape[1] * self.context.size * (self.axis.size if self.axis.sequence else 1)
        if places is None:
            if rows == x.shape[1]:
                return x
            places = torch.arange(rows, device=x.device).expand(x.shape[0], -1)
        found, _ = self.pick(x, places)
        if self.context.size == 1:
            return found
        from parallel.context import summed

        return summed(found, self.context.group)

    # -- products ----------------------------------------------------------------------------------------------

    def attention_backend(self, call: Call) -> Backend:
        """Who computes such calls; `call` has this tensor rank's heads and the whole sequence."""
        ranks = self.context.size  # each has the whole sequence of some of the heads, and at least one key head
        return self.backends.choose(call._replace(heads=call.heads // ranks, groups=max(1, call.groups // ranks)))

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """`kernels.rotary.rotary_pair`."""
        return rotary_pair(q, k, cos, sin, places, self.kernels.rotary)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, backend: Backend = "torch", **options: Any) -> Tensor:
        """`kernels.attention.attention` over this rank's heads. Where the sequence is shared, each context rank first
        trades its slice of all these heads for the whole sequence of some of them."""
        if self.context.size == 1:
            return attend(backend, q, k, v, **options)
        from parallel.context import exchanged_attention

        return exchanged_attention(q, k, v, self.context, backend=backend, **options)


class Linear(nn.Module):
    """x (..., in) -> (..., out), the same on every tensor rank."""

    def __init__(self, in_features: int, out_features: int, bias: bool, std: float) -> None:
        super().__init__()
        self.weight = describe(nn.Parameter(torch.empty(out_features, in_features)), Initial("normal", std))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = describe(nn.Parameter(torch.empty(out_features)), Initial("zeros"), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Activation(NamedTuple):
    """One of `kernels.activation.ACTIVATIONS`, and who computes it."""

    name: str
    backend: Kernel

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return activate(self.name, x, bias, self.backend)


class ColumnLinear(nn.Module):
    """x (B, s, in) -> (B, S, sum(outputs) / tensor). Gathers the sequence first where it is cut."""

    def __init__(
        self,
        axis: TensorAxis,
        context: ContextAxis,
        in_features: int,
        outputs: dict[str, int],
        bias: bool,
        std: float,
        lora: LoRA | None,
    ) -> None:
        super().__init__()
        self.axis, self.context, self.lora = axis, context, lora
        self.rows = rows = {name: count // axis.size for name, count in outputs.items()}
        total = sum(rows.values())
        weights, biases, start = [], [], 0
        for name, count in outputs.items():
            first, local = rows[name] * axis.rank, rows[name]
            weights.append(Piece(name, (count, in_features), (first, 0), (local, in_features), start))
            biases.append(Piece(name, (count,), (first,), (local,), start))
            start += local
        self.weight = describe(nn.Parameter(torch.empty(total, in_features)), Initial("normal", std), tuple(weights))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = describe(nn.Parameter(torch.empty(total)), Initial("zeros"), tuple(biases), decay=False)
        mark_cut(self.weight, axis, 0)
        mark_cut(self.bias, axis, 0)
        if lora is not None:
            self.lora_a, self.lora_b = column_factors(axis, in_features, outputs, lora)

    def forward(self, x: Tensor, activation: Activation | None = None, keys: Tensor | None = None) -> Tensor:
        """With an activation of the result: Triton's adds the bias. keys (B,): of the samples, for dropout before LoRA."""
        x = enter(x, self.axis)
        fused = activation is not None and activation.backend == "triton"
        y = F.linear(x, self.weight, None if fused else self.bias)
        if self.lora is not None:
            y = self._adapted(y, x, self.lora, keys)
        if activation is None:
            return y
        return activation(y, self.bias) if fused else activation(y)

    def _adapted(self, y: Tensor, x: Tensor, lora: LoRA, keys: Tensor | None) -> Tensor:
        """y with s B A x added to the targets' features."""
        x = dropped(x, lora, keys, self.context) if self.training else x
        rows = [count for name, count in self.rows.items() if name in lora.targets]
        thin = zip(F.linear(x, self.lora_a).split(lora.rank, dim=-1), self.lora_b.split(rows), strict=True)
        features = y.split([*self.rows.values()], dim=-1)
        return torch.cat(
            [
                torch.add(part, F.linear(*next(thin)), alpha=lora.scale) if name in lora.targets else part
                for name, part in zip(self.rows, features, strict=True)
            ],
            dim=-1,
        )


class RowLinear(nn.Module):
    """x (B, S, in / tensor) -> (B, s, out), summed over the tensor ranks; the bias is added once, after the sum."""

    def __init__(
        self,
        axis: TensorAxis,
        context: ContextAxis,
        in_features: int,
        out_features: int,
        bias: bool,
        std: float,
        lora: LoRA | None,
    ) -> None:
        super().__init__()
        self.axis, self.context, self.lora = axis, context, lora
        local = in_features // axis.size
        piece = Piece("", (out_features, in_features), (0, local * axis.rank), (out_features, local))
        self.weight = describe(nn.Parameter(torch.empty(out_features, local)), Initial("normal", std), (piece,))
        mark_cut(self.weight, axis, 1)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = mark_summed(
                describe(nn.Parameter(torch.empty(out_features)), Initial("zeros"), decay=False), axis
            )
        if lora is not None:
            self.lora_a, self.lora_b = row_factors(axis, in_features, out_features, lora)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """keys (B,): of the samples, for dropout before LoRA."""
        alone = self.axis.size == 1
        y = F.linear(x, self.weight, self.bias if alone else None)
        if self.lora is not None:
            first = x.shape[-1] * self.axis.rank
            thin = dropped(x, self.lora, keys, self.context, first) if self.training else x
            y = torch.add(y, F.linear(F.linear(thin, self.lora_a), self.lora_b), alpha=self.lora.scale)
        if alone:
            return y
        y = leave(y, self.axis)
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """Layer or root-mean-square norm over H; replicated, its gradient summed over the tensor ranks where the sequence is cut."""

    def __init__(
        self, axis: TensorAxis, kind: str, hidden_size: int, epsilon: float, bias: bool, backend: Kernel = "torch"
    ) -> None:
        super().__init__()
        self.kind, self.epsilon, self.backend = kind, epsilon, backend
        weight = describe(nn.Parameter(torch.empty(hidden_size)), Initial("ones"), decay=False)
        self.weight = mark_summed(weight, axis)
        self.bias: nn.Parameter | None = None
        if bias and kind == "layer":
            self.bias = mark_summed(
                describe(nn.Parameter(torch.empty(hidden_size)), Initial("zeros"), decay=False), axis
            )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dropout: float = 0.0,
        keys: Tensor | None = None,
        site: int = 0,
        first_row: int = 0,
    ) -> Any:
        """The norm of x; with a residual, the norm of its sum with x after dropout, and that sum: both (B, s, H). dropout,
        its rate, keys, site and first_row: as in `kernels.norm.add_norm`."""
        weights, layer = (self.weight, self.bias, self.epsilon), self.kind == "layer"
        if residual is None:
            return norm(x, *weights, layer=layer, backend=self.backend)
        places = {"dropout": dropout, "keys": keys, "site": site, "first_row": first_row}
        return add_norm(x, residual, *weights, layer=layer, backend=self.backend, **places)  # type: ignore[arg-type]


def _slice(x: Tensor, count: int, number: int) -> Tensor:
    """The number-th of `count` equal parts of the sequence (dimension 1)."""
    rows = x.shape[1] // count
    return x[:, number * rows : (number + 1) * rows] if count > 1 else x
