"""Every tensor-parallel layer against its unsharded twin, forward and backward, in real processes.

The twin is plain torch on whole float64 tensors; the shares are cut here, by hand, so that a layer's own description of
its pieces is tested too: what it says of its rows must be what the twin has there.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.adapters import LoRA
from parallel.axes import TensorAxis
from parallel.gradients import sum_slices
from parallel.grid import start_grid
from parallel.layers import Parts
from parallel.layout import Layout, rank_and_world
from parallel.logical import Piece, logical_tensors, view
from parallel.vocabulary import padded_vocabulary
from tests.distributed import run_ranks

B, S, H, FEATURES = 3, 8, 12, 16  # batch, sequence, hidden, inner features
VOCABULARIES = (300, 128, 90)  # with some padding, none, and a last rank (of 4) that holds nothing else
WHOLE = Parts(TensorAxis())


class Sides(NamedTuple):
    """How one layer's inputs and outputs are cut: the dimension that is shared out, None where all ranks have all."""

    x: int | None
    y: int | None


def numbers(*shape: int, seed: int) -> Tensor:
    """Standard normal, the same on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(x: Tensor, dim: int | None, axis: TensorAxis) -> Tensor:
    return x if dim is None else x.chunk(axis.size, dim)[axis.rank]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert found.shape == expected.shape and error < 1e-5, f"{what}: off by {error:.1e}"


def named(module: nn.Module) -> list[tuple[str, Piece, nn.Parameter]]:
    return logical_tensors(nn.ModuleDict({"layer": module}))


def fill(twin: nn.Module, share: nn.Module) -> None:
    """Give the twin random weights and the share its pieces of them; padding rows stay zero."""
    whole = {}
    for number, (name, piece, parameter) in enumerate(named(twin)):
        whole[name] = numbers(*piece.size, seed=100 + number)
        view(parameter.data, piece).copy_(whole[name])
    for name, piece, parameter in named(share):
        assert piece.shape == whole[name].shape
        view(parameter.data, piece).copy_(boxed(whole[name], piece.offset, piece.size))


def boxed(tensor: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(first, first + n) for first, n in zip(offset, size, strict=True))]


def made(make: Callable[[Parts], nn.Module], axis: TensorAxis) -> tuple[nn.Module, nn.Module]:
    """The twin and this rank's share, with the same weights."""
    modules = make(WHOLE).double(), make(Parts(axis)).double()
    for module in modules:
        for parameter in module.parameters():
            parameter.data.zero_()
    fill(*modules)
    return modules


def check_gradients(twin: nn.Module, share: nn.Module) -> None:
    expected = {name: view(parameter.grad, piece) for name, piece, parameter in named(twin)}
    for name, piece, parameter in named(share):
        close(view(parameter.grad, piece), boxed(expected[name], piece.offset, piece.size), f"gradient of {name}")


def check(make: Callable[[Parts], nn.Module], axis: TensorAxis, x: Tensor, sides: Sides, columns: list[int]) -> None:
    """Output, input gradient and weight gradients. columns: sizes of the features that are shared out one by one."""
    twin, share = made(make, axis)
    whole, ours = x.clone().requires_grad_(), part(x, sides.x, axis).clone().requires_grad_()
    y, z = twin(whole), share(ours)

    def cut(tensor: Tensor) -> Tensor:
        if columns:
            return torch.cat([part(some, -1, axis) for some in tensor.split(columns, dim=-1)], dim=-1)
        return part(tensor, sides.y, axis)

    close(z, cut(y), "output")
    cotangent = numbers(*y.shape, seed=7)
    y.backward(cotangent)
    z.backward(cut(cotangent))
    sum_slices(share.parameters(), axis.group)
    close(ours.grad, part(whole.grad, sides.x, axis), "input gradient")
    check_gradients(twin, share)


def check_linear(axis: TensorAxis) -> None:
    cut = 1 if axis.sequence else None
    x, inner = numbers(B, S, H, seed=1), numbers(B, S, FEATURES, seed=2)
    for bias in (True, False):
        for outputs in ({"q": 16, "k": 8, "v": 8}, {"gate": 16, "up": 16}, {"": FEATURES}):
            check(methodcaller("column", H, outputs, bias, 0.1), axis, x, Sides(cut, -1), list(outputs.values()))
        check(methodcaller("row", FEATURES, H, bias, 0.1), axis, inner, Sides(-1, cut), [])


class Keyed(nn.Module):
    """A layer that is given the samples' keys, for the dropout before LoRA's factors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, keys=torch.arange(B, dtype=torch.int32))


def check_lora(axis: TensorAxis) -> None:
    cut = 1 if axis.sequence else None
    x, inner = numbers(B, S, H, seed=1), numbers(B, S, FEATURES, seed=2)
    outputs, lora = {"q": 16, "k": 8, "v": 8}, LoRA(("q", "v"), 3, 0.5, dropout=0.3, site=9)
    sides = Sides(cut, -1), Sides(-1, cut)
    check(lambda parts: Keyed(parts.column(H, outputs, True, 0.1, lora)), axis, x, sides[0], [*outputs.values()])
    check(
        lambda parts: Keyed(parts.column(H, {"up": 16}, False, 0.1, lora._replace(targets=("up",)))),
        axis,
        x,
        sides[0],
        [],
    )
    check(lambda parts: Keyed(parts.row(FEATURES, H, True, 0.1, lora)), axis, inner, sides[1], [])


def check_qkv_rows(axis: TensorAxis) -> None:
    """A fused share holds its chunk of each of q, k and v, one after the other: cut by hand."""
    wholes = {name: numbers(count, H, seed=count) for name, count in {"q": 16, "k": 8, "v": 4}.items()}
    _, share = made(methodcaller("column", H, {name: len(w) for name, w in wholes.items()}, False, 0.1), axis)
    rows = torch.cat([part(whole, 0, axis) for whole in wholes.values()])
    share.weight.data.copy_(rows)
    pieces = named(share)
    assert [name for name, _, _ in pieces] == ["q.weight", "k.weight", "v.weight"]
    for _, piece, parameter in pieces:
        assert torch.equal(view(parameter.data, piece), boxed(wholes[piece.name], piece.offset, piece.size))


def check_norms(axis: TensorAxis) -> None:
    cut = 1 if axis.sequence else None
    x = numbers(B, S, H, seed=3)
    for kind, bias in (("layer", True), ("layer", False), ("rms", True)):
        check(methodcaller("norm", kind, H, 1e-5, bias), axis, x, Sides(cut, cut), [])


def check_table(axis: TensorAxis) -> None:
    """Learned positions, added to this rank's slice of the sequence."""
    table, whole = Parts(axis).table(S, H, 0.1), numbers(S, H, seed=4).requires_grad_()
    table.data = whole.detach().clone()
    cotangent = numbers(B, S, H, seed=5)
    (whole[None].expand(B, S, H) * cotangent).sum().backward()
    (
        Parts(axis).scatter(table[None].expand(B, S, H)) * part(cotangent, 1 if axis.sequence else None, axis)
    ).sum().backward()
    sum_slices([table], axis.group)
    close(table.grad, whole.grad, "gradient of the positions")


def check_vocabulary(axis: TensorAxis) -> None:
    cut = 1 if axis.sequence else None
    for size in VOCABULARIES:
        ids = torch.randint(0, size, (B, S), generator=torch.Generator().manual_seed(size))
        ids[0, :2] = torch.tensor([0, size - 1])
        twin, share = made(methodcaller("embedding", size, H, 0.1), axis)
        y, z = twin(ids), share(ids)
        close(z, part(y, cut, axis), "embedding")
        cotangent = numbers(B, S, H, seed=6)
        y.backward(cotangent)
        z.backward(part(cotangent, cut, axis))
        check_gradients(twin, share)
        check_head(axis, size, ids)


def check_head(axis: TensorAxis, size: int, targets: Tensor) -> None:
    cut = 1 if axis.sequence else None
    x, mask = numbers(B, S, H, seed=8), (numbers(B, S, seed=9) > 0).float()
    _, share = made(methodcaller("head", H, size, 0.1), axis)
    weight = numbers(size, H, seed=100).requires_grad_()
    whole, ours = x.clone().requires_grad_(), part(x, cut, axis).clone().requires_grad_()
    logits = F.linear(whole, weight)
    expected = (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") * mask.flatten()).sum()
    loss = share(ours, targets, mask)
    close(loss, expected, "loss")
    close(share.logits(ours.detach()), logits.float(), "logits")
    (3 * expected).backward()
    (3 * loss).backward()
    close(ours.grad, part(whole.grad, cut, axis), "gradient of the head's input")
    [(_, piece, parameter)] = named(share)
    if piece.size[0]:
        close(view(parameter.grad, piece), boxed(weight.grad, piece.offset, piece.size), "gradient of the head")
    padding = parameter.grad[piece.size[0] :]
    assert padding.numel() == padded_vocabulary(size) // axis.size * H - piece.size[0] * H and not padding.any()


CHECKS = (check_linear, check_lora, check_qkv_rows, check_norms, check_table, check_vocabulary)


def check_layers(sequence: bool) -> None:
    grid = start_grid(Layout(tensor=rank_and_world()[1], sequence=sequence), 60)
    assert grid.tensor.size > 1 and grid.tensor.sequence == sequence
    for run in CHECKS:
        run(grid.tensor)


@pytest.mark.parametrize("sequence", [False, True], ids=["whole sequence", "cut sequence"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_layer_equals_its_unsharded_twin_forward_and_backward(tensor: int, sequence: bool) -> None:
    run_ranks(tensor, check_layers, sequence)
