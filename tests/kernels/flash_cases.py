"""What the tests of the attention kernels run inside Triton's interpreter: each function returns numbers to be judged."""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from kernels import attention_launch, attention_triton, tiles
from kernels.attention import alibi_slopes, attention
from kernels.attention_triton import flash_attention
from kernels.noise import keep_mask, sample_keys, split_keys
from tests.kernels.dense import dense, documents_of, visible_places

SITE = 9
FRACTION = 0.3  # dropout, where it is on
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Setting(NamedTuple):
    """One call of attention on random tensors."""

    queries: int
    keys: int
    heads: int = 2
    groups: int = 1
    batch: int = 1
    size: int = 16
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    slopes: bool = False
    edges: tuple[int, ...] | None = None  # of a relative bias's buckets, if there is one
    documents: tuple[int, ...] = ()  # lengths, of the keys
    query_documents: tuple[int, ...] = ()
    dropout: bool = False
    first_query: int = 0
    first_head: int = 0
    scale: float | None = None
    softcap: float | None = None
    magnitude: float = 1.0  # of the queries
    offset: float = 0.0  # added to queries, and taken from keys
    layout: str = (
        "packed"  # "packed": views of one product, if they can be; "apart", "transposed", "odd": see `tensors`
    )
    tile: tuple[int, int] = (16, 16)
    descriptors: bool = False


class Error(NamedTuple):
    """Of one tensor, against float64."""

    ours: float  # largest of an element
    eager: float  # the same of plain torch in this type
    relative: float  # Frobenius norms; a true gradient of zero (one key or bucket alone) counts as `errors` says


def tensors(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, S, N, D), k and v (B, T, G, D), in the layout wanted, without gradients."""
    s = setting
    generator = torch.Generator().manual_seed(1 + s.queries + 100 * s.keys + s.size)
    dtype = getattr(torch, s.dtype)

    def made(length: int, heads: int) -> Tensor:
        return torch.randn(s.batch, length, heads, s.size, generator=generator).to(dtype)

    q, k, v = (
        made(s.queries, s.heads) * s.magnitude + s.offset,
        made(s.keys, s.groups) - s.offset,
        made(s.keys, s.groups),
    )
    if s.layout == "packed" and s.queries == s.keys:
        whole = torch.cat((q, k, v), dim=2)
        q, k, v = whole.split([s.heads, s.groups, s.groups], dim=2)
    elif s.layout == "transposed":  # (B, N, S, D) in memory
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif s.layout == "odd":  # rows that begin anywhere, and a last dimension with steps
        q = torch.nn.functional.pad(q, (1, 2))[..., 1 : 1 + s.size]
        k, v = k.transpose(2, 3).contiguous().transpose(2, 3), torch.stack((v, v), dim=-1)[..., 0]
    return q, k, v


def table_of(setting: Setting) -> dict[str, Tensor]:
    """bias (N, I) float32, by its name, if there is one."""
    if setting.edges is None:
        return {}
    generator = torch.Generator().manual_seed(2 + setting.heads)
    return {"bias": torch.randn(setting.heads, len(setting.edges) + 1, generator=generator)}


def options_of(setting: Setting) -> dict[str, Any]:
    """All but q, k, v and bias."""
    s = setting
    options: dict[str, Any] = {"causal": s.causal, "window": s.window, "first_query": s.first_query, "scale": s.scale}
    options["softcap"] = s.softcap
    if s.slopes:
        options["slopes"] = alibi_slopes(s.heads + 3)[:-3]
    if s.edges is not None:
        options["edges"] = torch.tensor(s.edges, dtype=torch.int32)
    if s.documents:
        options["documents"] = documents_of(*s.documents).expand(s.batch, s.keys)
    if s.query_documents:
        options["query_documents"] = documents_of(*s.query_documents).expand(s.batch, s.queries)
    if s.dropout:
        keys = sample_keys(5, torch.arange(s.batch) + 3)
        options |= {"dropout": FRACTION, "keys": keys, "site": SITE, "first_head": s.first_head}
    return options


def truth(setting: Setting, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in float64."""
    s, options = setting, options_of(setting)
    keep = same = None
    if s.dropout:
        rows = torch.arange(s.first_query, s.first_query + s.queries)
        keep = keep_mask(split_keys(options["keys"], s.first_head, s.heads), SITE, rows, torch.arange(s.keys), FRACTION)
        keep = keep.view(s.batch, s.heads, s.queries, s.keys)
    if s.documents:
        numbers = options["documents"]
        own = options.get("query_documents")
        own = numbers[:, s.first_query : s.first_query + s.queries] if own is None else own
        same = own[:, :, None] == numbers[:, None, :]
    names = ("causal", "window", "slopes", "edges", "scale", "first_query", "softcap")
    plain = {name: options[name] for name in names if name in options}
    return dense(q, k, v, bias=bias, keep=keep, dropout=FRACTION if s.dropout else 0.0, same=same, **plain)


@contextmanager
def tiled(setting: Setting) -> Iterator[None]:
    """The kernels with the tile of the setting, and with descriptors where it wants them."""
    first = 0 if setting.descriptors else 90
    with (
        mock.patch.object(tiles, "INTERPRETED", tiles.Tile(*setting.tile, 4, 1)),
        mock.patch.object(attention_launch, "FIRST_WITH_DESCRIPTORS", first),
    ):
        yield


def results(setting: Setting, function: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, and the gradients of q, k, v, and bias if there is one, under a random gradient of the output."""
    table = table_of(setting)
    inputs = tuple(x.to(dtype or x.dtype).requires_grad_() for x in (*tensors(setting), *table.values()))
    out = function(*inputs[:3], **dict(zip(table, inputs[3:], strict=True)))
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(out.shape, generator=generator).to(getattr(torch, setting.dtype)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights, materialize_grads=True)]


def kernel_results(setting: Setting) -> list[Tensor]:
    with tiled(setting):
        return results(setting, partial(flash_attention, **options_of(setting)))


def errors(setting: Setting) -> dict[str, Error]:
    """Of the output and the gradients. Zero counts as 0.05 an element, in a bias as 0.25 a query: a bucket is their sum."""
    exact = results(setting, partial(truth, setting), torch.float64)
    eager = results(setting, partial(attention, **options_of(setting)))
    ours = kernel_results(setting)
    names = ("output", "dq", "dk", "dv", "dbias")[: len(exact)]
    zero = dict.fromkeys(names, 0.05) | {"dbias": 0.25 * max(setting.queries, 1) ** 0.5}
    return {
        name: Error(
            float((mine.double() - true).abs().max()),
            float((plain.double() - true).abs().max()),
            float((mine.double() - true).norm() / true.norm().clamp(min=zero[name] * true.numel() ** 0.5)),
        )
        for name, mine, plain, true in zip(names, ours, eager, exact, strict=True)
    }


def wrong(setting: Setting) -> list[str]:
    """Which tensors break the rule: an error of at most twice plain torch's + 1e-5, and relative to the Frobenius norm of
    1e-5 in float32, 2e-3 in float16. Twice that for gradients.

    Large scores have no relative bound: their own rounding is large. In float16 the 1e-5 is then a share of the operands:
    in tiles, delta comes from the rounded output (Dao 2023), which plain torch has not rounded yet. A bucket of a bias adds
    that up over all queries, so in float16 its gradient has the relative bound alone.
    """
    hostile = setting.magnitude != 1.0 or setting.offset != 0.0
    bound = {"float32": 1e-5, "float16": 2e-3}[setting.dtype]
    allowance = 1e-5 * (setting.magnitude if setting.dtype == "float16" else 1.0)
    found = []
    for name, error in errors(setting).items():
        factor = 1 if name == "output" else 2
        summed = name == "dbias" and setting.dtype == "float16"
        if not summed and not error.ours <= factor * (2 * error.eager + allowance):
            found.append(f"{name}: error {error.ours:.2e}, eager {error.eager:.2e}")
        if not hostile and not error.relative <= factor * bound:
            found.append(f"{name}: relative error {error.relative:.2e}")
    return found


def bias_gradient_in(setting: Setting, dtype: str) -> tuple[str, list[str]]:
    """Type of the gradient of a bias of that type, and what is wrong with it against a float32 one's."""
    bias = table_of(setting)["bias"].to(getattr(torch, dtype)).requires_grad_()
    wide = bias.detach().float().requires_grad_()
    found, expected = (
        torch.autograd.grad(flash_attention(*tensors(setting), bias=b, **options_of(setting)).sin().sum(), b)[0]
        for b in (bias, wide)
    )
    close = torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-4)
    return str(found.dtype), [] if close and expected.abs().max() > 0.1 else [f"{found} for {expected}"]


def walked_diagonals(setting: Setting) -> tuple[int, int]:
    """The lowest diagonal of tiles of 16 and the number of them; those left out of the square would add nothing."""
    s = setting
    options = attention_triton.Options(s.causal, s.window or 0, 0.0, 0, 0, s.first_query, 1.0, 0.0)
    lowest, count = attention_launch.diagonals(options, 16, s.queries, s.keys)
    seen = visible_places(s.queries, s.keys, s.causal, s.window, s.first_query)
    for i, j in seen.nonzero().tolist():
        assert lowest <= j // 16 - i // 16 < lowest + count
    return lowest, count


def masks(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, S, T) of what dropout kept: in the output, in dV, and as the hash says.

    Keys of zero weigh alike, and values that are rows of the identity show each probability.
    """
    s = setting
    assert s.keys <= s.size and s.queries <= s.size and s.heads == s.groups
    options = {"causal": False, "dropout": FRACTION, "keys": sample_keys(5, torch.arange(s.batch)), "site": SITE}
    q, k, _ = tensors(s)
    v = torch.eye(s.keys, s.size)[None, :, None].expand(s.batch, s.keys, s.heads, s.size).clone().requires_grad_()
    with tiled(s):
        out = flash_attention(q, k * 0.0, v, first_head=s.first_head, first_query=s.first_query, **options)
        grad = torch.eye(s.queries, s.size)[None, :, None].expand(out.shape)
        (dv,) = torch.autograd.grad(out, v, grad)
    rows = torch.arange(s.first_query, s.first_query + s.queries)
    expected = keep_mask(split_keys(options["keys"], s.first_head, s.heads), SITE, rows, torch.arange(s.keys), FRACTION)
    in_output = out.detach().permute(0, 2, 1, 3)[..., : s.keys] > 0
    in_gradient = dv.permute(0, 2, 3, 1)[:, :, : s.queries] > 0
    return in_output, in_gradient, expected.view(in_output.shape)


def disturbed(setting: Setting, place: int) -> tuple[list[bool], list[bool]]:
    """For each output place, whether it is bitwise the same after k and v (first), and q (second), change at `place`."""
    q, k, v = tensors(setting)
    with tiled(setting):
        options = options_of(setting) | table_of(setting)
        before = flash_attention(q, k, v, **options)
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, place] += 3.0
        after = flash_attention(q, others[1], others[2], **options)
        alone = flash_attention(others[0], k, v, **options)
    same = [(before == x).flatten(2).all(-1).all(0).tolist() for x in (after, alone)]
    return same[0], same[1]


def permuted(lengths: tuple[int, ...], order: tuple[int, ...]) -> float:
    """Largest difference between documents computed in one order and in another."""
    total = sum(lengths)
    setting = Setting(total, total, documents=lengths)
    q, k, v = tensors(setting)
    places = torch.arange(total).split(lengths)
    shuffled = torch.cat([places[i] for i in order])
    out = flash_attention(q, k, v, documents=documents_of(*lengths))
    moved = [x[:, shuffled] for x in (q, k, v)]
    other = flash_attention(*moved, documents=documents_of(*(lengths[i] for i in order)))
    return float((other - out[:, shuffled]).abs().max())


def far_apart() -> float:
    """Error with the second sequence 2^31 elements behind the first: 4 GiB of addresses, of which a page is touched."""
    step, (length, size) = 2**31 + 64, (20, 16)
    storage = torch.empty(step + 3 * length * size, dtype=torch.float16)
    views = [storage[i * length * size :].as_strided((2, length, 1, size), (step, size, size, 1)) for i in range(3)]
    for i, view in enumerate(views):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(i)))
    out = flash_attention(*views)
    return float((out - flash_attention(*(view.contiguous() for view in views))).abs().max())


# -- planted faults ------------------------------------------------------------------------------------------------

_numbers = itertools.count()


@contextmanager
def planted(module: str, right: str, fault: str) -> Iterator[None]:
    """The kernels with `right`, which must stand in `module` of kernels/triton, replaced by `fault`."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"faulted_{next(_numbers)}"
        target = Path(folder) / package
        target.mkdir()
        for path in (REPOSITORY / "kernels" / "triton").glob("*.py"):
            text = path.read_text().replace("kernels.triton.", f"{package}.")
            if path.stem == module:
                assert right in text, f"{module} has no {right!r}"
                text = text.replace(right, fault)
            (target / path.name).write_text(text)
        sys.path.insert(0, folder)
        try:
            names = ("attention_forward", "attention_backward", "attention_bias")
            modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
            with mock.patch.multiple(attention_launch, **modules):
                yield
        finally:
            sys.path.remove(folder)


def wrong_with_fault(module: str, right: str, fault: str, settings: list[Setting]) -> list[list[str]]:
    """For each of the settings, what `wrong` finds."""
    with planted(module, right, fault):
        return [wrong(setting) for setting in settings]


def refusal(dtype: str) -> str:
    q = torch.zeros(1, 4, 1, 16, dtype=getattr(torch, dtype))
    return attention_triton.unsupported(q, q, q)


def logarithms(setting: Setting) -> tuple[list[float], list[float]]:
    """lse of the kernel, and the exact one: natural logarithms, of every row, without options but causality."""
    q, k, v = tensors(setting)
    scale = setting.size**-0.5
    _, lse = torch.ops.kernels.flash_attention(
        q, k, v, *[None] * attention_triton.NUM_OPTIONAL, True, 0, 0.0, 0, 0, 0, scale, 0.0
    )
    scores = torch.einsum("bsnd,btnd->bnst", q.double(), k.double()) * scale
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    exact = torch.logsumexp(scores.masked_fill(hidden, -torch.inf), -1)
    return (lse.double() * torch.log(torch.tensor(2.0).double())).flatten().tolist(), exact.flatten().tolist()


def blind_rows(setting: Setting) -> tuple[int, int, int]:
    """Rows of all heads that see no key; how many numbers of their output and gradient are not 0; and how many of their
    lse are minus infinity."""
    blind = torch.ones(setting.batch, setting.queries, setting.heads, dtype=torch.bool)
    if setting.keys:
        ones = [torch.ones_like(x, dtype=torch.float64) for x in tensors(setting)]
        # Values of one add up to the sum of the weights.
        blind = truth(setting._replace(dropout=False, edges=None), *ones).abs().sum(-1) == 0
    arguments = operator_arguments(setting)
    out, lse = torch.ops.kernels.flash_attention(*arguments)
    (gradient,) = torch.autograd.grad(out, arguments[0], torch.ones_like(out))
    nonzero = int(torch.count_nonzero(out[blind]) + torch.count_nonzero(gradient[blind]))
    return int(blind.sum()), nonzero, int(torch.isneginf(lse.transpose(1, 2)[blind]).sum())


def shapes(setting: Setting) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in kernel_results(setting)]


def operator_arguments(setting: Setting) -> tuple[Any, ...]:
    """Of torch.ops.kernels.flash_attention, with gradients wanted."""
    with mock.patch.object(torch.ops.kernels, "flash_attention", side_effect=Captured) as operator, suppress(Captured):
        inputs = [x.requires_grad_() for x in (*tensors(setting), *table_of(setting).values())]
        flash_attention(*inputs[:3], **dict(zip(table_of(setting), inputs[3:], strict=True)), **options_of(setting))
    return operator.call_args.args


class Captured(Exception):
    """Raised in place of the operator."""


def opcheck(setting: Setting) -> dict[str, str]:
    return torch.library.opcheck(torch.ops.kernels.flash_attention.default, operator_arguments(setting))


def compiled(setting: Setting) -> tuple[float, list[str], list[int]]:
    """Largest difference of a compiled call's output and gradients from an eager one's, the operators in its one graph,
    and how often forward and backward were launched by it."""
    options = options_of(setting)
    graphs: list[torch.fx.GraphModule] = []

    def everything(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return flash_attention(q, k, v, bias=bias, **options) * 2.0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    expected = results(setting, everything)
    with (
        mock.patch.object(attention_launch, "forward", wraps=attention_launch.forward) as forward,
        mock.patch.object(attention_launch, "backward", wraps=attention_launch.backward) as backward,
    ):
        found = results(setting, torch.compile(everything, fullgraph=True, dynamic=False, backend=backend))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    operators = [name for name in names if name.startswith("kernels.")]
    return difference, operators, [forward.call_count, backward.call_count]
