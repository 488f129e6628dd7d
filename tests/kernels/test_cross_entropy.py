"""The fused output layer and loss against torch's cross-entropy of whole logits, on one rank and with a cut vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy as module
from kernels.cross_entropy import chunk_rows, cross_entropy, linear_cross_entropy, triton_chunk_rows
from tests.distributed import run_ranks

HIDDEN = 10
FACTOR = 0.37  # what the loss is multiplied by, as the global count of targets does
ADDED = [{}, {"smoothing": 0.1}, {"z_loss": 0.01}, {"smoothing": 0.3, "z_loss": 1e-3}]  # to the cross-entropy


class Case(NamedTuple):
    x: Tensor  # (B, S, H)
    weight: Tensor  # (V, H), padded
    targets: Tensor  # (B, S)
    mask: Tensor  # (B, S)


def make_case(
    vocab_size: int, padded: int, dtype: torch.dtype = torch.float64, rows: tuple[int, int] = (3, 11)
) -> Case:
    """The padding rows hold large numbers: nothing may see them."""
    generator = torch.Generator().manual_seed(vocab_size)
    x = torch.randn(*rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = 30.0
    targets = torch.randint(vocab_size, rows, generator=generator)
    targets[0, :2] = torch.tensor([0, vocab_size - 1])
    mask = (torch.rand(rows, generator=generator) < 0.7).float()
    mask[0, :2] = 1
    return Case(x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, mask)


def reference(
    case: Case, vocab_size: int, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of x and weight by torch, in float64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in case[:2])
    logits = (x @ weight[:vocab_size].T).flatten(0, 1)
    losses = F.cross_entropy(logits, case.targets.flatten(), reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * torch.logsumexp(logits, dim=1) ** 2
    loss = (losses * case.mask.flatten()).sum() * FACTOR
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def ours(case: Case, vocab_size: int, **added: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = linear_cross_entropy(*case, vocab_size=vocab_size, **added) * FACTOR
    return loss.detach(), *torch.autograd.grad(loss, (case.x, case.weight))


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda num_rows, num_classes: rows)


@pytest.mark.parametrize("chunk", [1, 10, 11, 32, 33, 1000])
@pytest.mark.parametrize(("vocab_size", "padded"), [(50, 50), (50, 64), (1, 8)])
@pytest.mark.parametrize("added", ADDED)
def test_equals_cross_entropy_of_whole_logits_for_every_chunk(
    chunk: int, vocab_size: int, padded: int, added: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, chunk)
    case = make_case(vocab_size, padded)
    for found, wanted in zip(ours(case, vocab_size, **added), reference(case, vocab_size, **added), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("added", ADDED)
def test_a_bias_is_one_more_column_of_the_weight(
    chunk: int, added: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, chunk)
    case = make_case(50, 64)
    bias = torch.randn(64, dtype=torch.float64).requires_grad_()
    loss = linear_cross_entropy(*case, vocab_size=50, bias=bias, **added) * FACTOR  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, (case.x, case.weight, bias))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*case, vocab_size=50, bias=bias, **added) * FACTOR, loss)  # type: ignore[arg-type]
    x = torch.cat((case.x.detach(), torch.ones(*case.x.shape[:-1], 1, dtype=torch.float64)), -1).requires_grad_()
    weight = torch.cat((case.weight.detach(), bias.detach()[:, None]), 1).requires_grad_()
    expected, of_x, of_weight = reference(case._replace(x=x, weight=weight), 50, **added)
    wanted = (of_x[..., :-1], of_weight[:, :-1], of_weight[:, -1])
    torch.testing.assert_close((loss.detach(), *found), (expected, *wanted), rtol=1e-12, atol=1e-12)
    assert not found[2][50:].any(), "the padding's biases have no gradient"


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("chunk", [4, 1000])
def test_gradients_are_those_of_the_loss(added: dict[str, float], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences, of the loss as it is computed without gradients."""
    small_chunks(monkeypatch, chunk)
    case = make_case(7, 8, rows=(2, 4))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, case.targets, case.mask, vocab_size=7, **added)  # type: ignore[arg-type]

    with torch.no_grad():
        case.weight[7:] = 0.0  # as it is in a model: gradcheck moves it too
    assert torch.autograd.gradcheck(loss, (case.x, case.weight))


def test_real_chunks_equal_cross_entropy_of_whole_logits() -> None:
    """More rows than are made at once, without changing anything."""
    case = make_case(30, 128, rows=(2, 70_000))
    assert 1 < 140_000 / chunk_rows(140_000, 128) <= 16
    for found, wanted in zip(ours(case, 30), reference(case, 30), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_have_a_float32_loss(
    dtype: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, chunk)
    case = make_case(50, 64, dtype)
    loss, *gradients = ours(case, 50)
    expected, *wanted = reference(case, 50)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, exact in zip(gradients, wanted, strict=True):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= tolerance * exact.norm()


def test_chunks_of_bfloat16_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the weight is off by its own rounding, not by one a chunk."""
    case = make_case(20, 20, torch.bfloat16, rows=(4, 500))
    exact = reference(case, 20)[2]
    small_chunks(monkeypatch, 2000)
    at_once = (ours(case, 20)[2].double() - exact).norm()
    small_chunks(monkeypatch, 5)
    assert (ours(case, 20)[2].double() - exact).norm() < 2 * at_once


def test_padding_has_no_probability_and_no_gradient() -> None:
    case = make_case(50, 64)
    loss, _, gradient = ours(case, 50)
    assert not gradient[50:].any()
    with torch.no_grad():
        case.weight[50:] = -1e4
    assert torch.equal(ours(case, 50)[0], loss)


def test_masked_targets_count_nothing() -> None:
    case = make_case(50, 64)
    case.mask[1] = 0
    loss, gradient, _ = ours(case, 50)
    assert not gradient[1].any()
    case.targets[1] = (case.targets[1] + 1) % 50
    assert torch.equal(ours(case, 50)[0], loss)
    nothing = case._replace(mask=torch.zeros_like(case.mask))
    for added in ADDED:
        assert all(torch.equal(part, torch.zeros_like(part)) for part in ours(nothing, 50, **added))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_without_gradients_the_loss_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, chunk)
    case = make_case(50, 64)
    for added in ADDED:
        expected = linear_cross_entropy(*case, vocab_size=50, **added)  # type: ignore[arg-type]
        assert expected.requires_grad
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(*case, vocab_size=50, **added), expected)  # type: ignore[arg-type]
        detached = Case(case.x.detach(), case.weight.detach(), case.targets, case.mask)
        assert torch.equal(linear_cross_entropy(*detached, vocab_size=50, **added), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("added", ADDED)
def test_large_logits_do_not_overflow(added: dict[str, float]) -> None:
    case = make_case(50, 64, torch.float32)
    loud = case._replace(x=(case.x.detach() * 1e4).requires_grad_())
    loss, *gradients = ours(loud, 50, **added)
    expected, *exact = reference(loud, 50, **added)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(gradients, exact, strict=True):
        assert (found - wanted).norm() <= 2e-3 * wanted.norm(), "rounded logits of 1e4 are off by 1e-3"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"smoothing": 1.0}, r"label smoothing is in \[0, 1\), found 1.0"),
        ({"smoothing": -0.1}, "label smoothing is in"),
        ({"z_loss": -1.0}, "z_loss is 0 or more"),
        ({"z_loss": float("nan")}, "z_loss is 0 or more"),
        ({"backend": "cuda"}, "unknown backend 'cuda': expected one of auto, triton, torch"),
        ({"backend": "triton"}, "cannot run on cpu: they run on a GPU; .*torch can"),
    ],
)
def test_what_there_is_not_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*make_case(50, 64, torch.float32), vocab_size=50, **wrong)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((9, 0), torch.float64)])
def test_a_gpu_whose_kernels_cannot_run_is_told(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    with FakeTensorMode():
        x = torch.empty(2, dtype=dtype, device="cuda")
        with pytest.warns(UserWarning, match="the loss runs in torch on cuda.*: (an old one has|they take)"):
            assert not module._runs_triton("auto", x)
        with pytest.raises(ValueError, match="torch can"):
            module._runs_triton("triton", x)
        assert not module._runs_triton("torch", x)
        assert not module._runs_triton("auto", torch.empty(2))


def test_a_gpu_runs_triton_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert module._runs_triton("auto", torch.empty(2, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_classes", [128, 50_304, 256_000])
@pytest.mark.parametrize("num_rows", [1, 1000, 4096, 8192, 1_000_000])
def test_tritons_chunks_are_few_alike_and_no_larger_in_memory(num_rows: int, num_classes: int, itemsize: int) -> None:
    """Than torch's, which needs 17 bytes for a class of a row (`pretrain.memory.LOGIT_BYTES`)."""
    rows = triton_chunk_rows(num_rows, num_classes, itemsize)
    count = -(-num_rows // rows)
    assert count <= 16 and rows * count - num_rows < count
    assert rows * itemsize <= 17 * chunk_rows(num_rows, num_classes)


@pytest.mark.parametrize("num_classes", [128, 50_304, 256_000])
@pytest.mark.parametrize("num_rows", [1, 1000, 4096, 1_000_000])
def test_chunks_are_few_and_bounded(num_rows: int, num_classes: int) -> None:
    rows = chunk_rows(num_rows, num_classes)
    assert -(-num_rows // rows) <= 16
    assert rows <= max(1024, (64 << 20) / (4 * num_classes), num_rows / 16 + 1)


def test_cross_entropy_of_logits_is_torchs() -> None:
    logits, targets = torch.randn(2, 5, 30).bfloat16(), torch.randint(30, (2, 5))
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    found = cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_does_not_learn_has_no_gradient_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other gradients are the same; those of a bias alone are made too."""
    case, bias = make_case(50, 64), torch.zeros(64, dtype=torch.float64, requires_grad=True)
    small_chunks(monkeypatch, 10)
    options = {"vocab_size": 50, "bias": bias}
    expected = torch.autograd.grad(linear_cross_entropy(*case, **options), (case.x, bias))
    products: list[tuple[int, ...]] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            products.extend([tuple(made.shape)] if function is torch.ops.aten.mm.default else [])
            return made

    with Counting():
        loss = linear_cross_entropy(case.x, case.weight.detach(), case.targets, case.mask, **options)
    assert (64, HIDDEN) not in products and products
    assert all(map(torch.equal, torch.autograd.grad(loss, (case.x, bias)), expected))
    alone = linear_cross_entropy(case.x.detach(), case.weight.detach(), case.targets, case.mask, **options)
    assert torch.equal(*torch.autograd.grad(alone, bias), expected[1])


# -- the vocabulary cut over ranks -------------------------------------------------------------------------------------

VOCABULARIES = [(50, 64), (64, 64), (17, 64), (3, 64)]  # with 3 or 17 real rows some ranks hold padding alone


def share_of_loss(dtype: torch.dtype, added: dict[str, float]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """In a rank: for every vocabulary the loss and this rank's gradients, made in chunks."""
    dist.init_process_group("gloo")
    module.chunk_rows = lambda num_rows, num_classes: 8
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = []
    for vocab_size, padded in VOCABULARIES:
        case = make_case(vocab_size, padded, dtype)
        count = padded // world
        weight = case.weight.detach()[rank * count : (rank + 1) * count].clone().requires_grad_()
        options = {"vocab_size": vocab_size, "first_class": rank * count, "group": dist.group.WORLD, **added}
        loss = linear_cross_entropy(case.x, weight, case.targets, case.mask, **options)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(case.x, weight, case.targets, case.mask, **options), loss)
        shares.append(((loss * FACTOR).detach(), *torch.autograd.grad(loss * FACTOR, (case.x, weight))))
    dist.destroy_process_group()
    return shares


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("added", ADDED[::3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_vocabulary_cut_over_ranks_changes_nothing(
    world: int, added: dict[str, float], dtype: torch.dtype, tolerance: float
) -> None:
    ranks = run_ranks(world, share_of_loss, dtype, added)
    for (vocab_size, padded), *shares in zip(VOCABULARIES, *ranks, strict=True):
        loss, of_x, of_weight = reference(make_case(vocab_size, padded, dtype), vocab_size, **added)
        losses, parts_of_x, slices = zip(*shares, strict=True)
        assert all(torch.equal(other, losses[0]) for other in losses), "the same on every rank"
        assert losses[0].item() == pytest.approx(loss.item(), rel=tolerance)
        options = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(torch.stack(parts_of_x).sum(0).double(), of_x, **options)
        torch.testing.assert_close(torch.cat(slices).double(), of_weight, **options)


# -- memory --------------------------------------------------------------------------------------------------------------

TOKENS, CLASSES = 8192, 50_304


class Peak(TorchDispatchMode):
    """The most bytes of tensors at once, of those that operators returned; what an operator takes inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = weakref.WeakKeyDictionary[Any, int]()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage] = storage.nbytes()
        self.most = max(self.most, sum(self.seen.values()))
        return out


def peak_bytes(loss: Callable[..., Tensor], dtype: torch.dtype) -> int:
    """Of loss and gradients of 8,192 tokens and 50,304 classes, beyond inputs; tensors have a shape and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (torch.empty(*shape, 64, dtype=dtype, requires_grad=True) for shape in ((1, TOKENS), (CLASSES,)))
        targets, mask = torch.zeros(1, TOKENS, dtype=torch.int64), torch.ones(1, TOKENS)
        with Peak() as peak:
            torch.autograd.grad(loss(x, weight, targets, mask), (x, weight))
    return peak.most


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy((x @ weight.T)[0].float(), targets[0], reduction="none")
    return (losses * mask[0]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tritons_loss_needs_less_than_a_tenth_of_the_plain_ones_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose logits, their logarithms and their gradients are three matrices of 1.6 GB; torch's operators take more inside,
    which is not counted, Triton's nothing."""
    monkeypatch.setattr(module, "_runs_triton", lambda backend, x: True)
    ours = peak_bytes(partial(linear_cross_entropy, vocab_size=50_257, smoothing=0.1, z_loss=1e-4), dtype)
    plain = peak_bytes(plain_loss, dtype)
    logits = TOKENS * CLASSES * 4
    assert 2 * logits < plain < 4 * logits
    assert ours > 1024 * CLASSES * dtype.itemsize, "a chunk of logits is there"
    print(f"{dtype}: {ours / 2**20:.0f} MiB of {plain / 2**20:.0f}")
    assert ours < plain / 10
