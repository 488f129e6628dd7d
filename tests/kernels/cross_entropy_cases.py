"""The loss's Triton kernels against float64, for the tests' interpreting process: settings, errors, planted faults."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kernels.triton
from kernels import available, cross_entropy, cross_entropy_triton
from tests.distributed import REPOSITORY, die_with_parent

BOUNDS = {"float32": 1e-5, "float16": 2e-3}  # relative Frobenius; gradients twice that
NAMES = ("loss", "gradient of x", "gradient of the weight", "gradient of the bias")


class Setting(NamedTuple):
    """One call. The padding rows of the weight hold large numbers: nothing may see them."""

    rows: int = 13
    vocab_size: int = 50
    padded: int = 64
    hidden: int = 12
    dtype: str = "float32"
    smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 1000
    block: int = 16
    magnitude: float = 1.0  # of the logits, about
    offset: float = 0.0  # of all logits, about
    ignored: str = "some"  # targets: some, all, none
    layout: str = "plain"  # of x and weight: plain, odd (misaligned), transposed
    shares: int = 1
    biased: bool = False


def tensors(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (1, M, H), weight (V, H), targets and mask (1, M)."""
    s = setting
    generator = torch.Generator().manual_seed(s.rows * 1000 + s.vocab_size)
    x = torch.randn(1, s.rows, s.hidden, generator=generator)
    weight = torch.randn(s.padded, s.hidden, generator=generator) * (s.magnitude / s.hidden**0.5)
    x[..., 0], weight[:, 0] = 1.0, weight[:, 0] + s.offset
    weight[s.vocab_size :] = 30.0
    targets = torch.randint(s.vocab_size, (1, s.rows), generator=generator)
    targets[0, -1], targets[0, 0] = 0, s.vocab_size - 1
    mask = (torch.rand(1, s.rows, generator=generator) < 0.7).float()
    mask[0, 0] = mask[0, -1] = 1.0
    mask = {"some": mask, "all": torch.zeros_like(mask), "none": torch.ones_like(mask)}[s.ignored]
    dtype = getattr(torch, s.dtype)
    return placed(x.to(dtype), s.layout), placed(weight.to(dtype), s.layout), targets, mask


def bias_of(setting: Setting) -> list[Tensor]:
    """(V,) where the setting has one, large where no class is."""
    if not setting.biased:
        return []
    bias = torch.randn(setting.padded, generator=torch.Generator().manual_seed(setting.padded))
    bias[setting.vocab_size :] = 30.0
    return [bias.to(getattr(torch, setting.dtype))]


def placed(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "odd":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        return flat.view(x.shape).copy_(x)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def by_torch(setting: Setting, dtype: torch.dtype) -> list[Tensor]:
    """Loss over the number of rows and its gradients, by torch's cross-entropy of whole logits in that type."""
    x, weight, targets, mask = tensors(setting)
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight))
    bias = [tensor.detach().to(dtype).requires_grad_() for tensor in bias_of(setting)]
    logits = (x @ weight[: setting.vocab_size].T)[0]
    for tensor in bias:
        logits = logits + tensor[: setting.vocab_size]
    losses = F.cross_entropy(logits, targets[0], reduction="none", label_smoothing=setting.smoothing)
    losses = losses + setting.z_loss * torch.logsumexp(logits, -1).square()
    loss = (losses * mask[0].to(dtype)).sum() / setting.rows
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, *bias))]


@contextmanager
def cut(setting: Setting) -> Iterator[None]:
    """Chunks of rows and blocks of classes as the setting wants them."""
    with (
        mock.patch.object(cross_entropy, "triton_chunk_rows", lambda *_: setting.chunk),
        mock.patch.object(cross_entropy_triton, "BLOCK", setting.block),
    ):
        yield


Call = Callable[..., Tensor]


def ours(setting: Setting, call: Call | None = None, **share: Any) -> list[Tensor]:
    """By the kernels; share: first_class and group of this rank, whose rows of the weight alone are taken then."""
    x, weight, targets, mask = tensors(setting)
    held = [weight, *bias_of(setting)]
    if share:
        held = [tensor.tensor_split(setting.shares)[dist.get_rank()].clone() for tensor in held]
    weight, *bias = (tensor.requires_grad_() for tensor in held)
    x.requires_grad_()
    options = {"smoothing": setting.smoothing, "z_loss": setting.z_loss, "backend": "triton", **share}
    options["bias"] = bias[0] if bias else None
    call = call or cross_entropy.linear_cross_entropy
    with cut(setting):
        loss = call(x, weight, targets, mask, vocab_size=setting.vocab_size, **options) / setting.rows
        with torch.no_grad():
            again = call(x, weight, targets, mask, vocab_size=setting.vocab_size, **options) / setting.rows
        assert torch.equal(loss, again), "without gradients the loss is another"
        return [loss.detach(), *torch.autograd.grad(loss, (x, weight, *bias))]


def by_ranks(setting: Setting, call: Call | None = None) -> list[Tensor]:
    """By real processes that share the vocabulary: the loss, the parts of x's gradient added up, the weight's joined."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(setting.shares):
            end, other = context.Pipe()
            arguments = (rank, setting, f"{folder}/store", other, call)
            processes.append(context.Process(target=_share, args=arguments))
            processes[-1].start()
            pipes.append(end)
        found = []
        for end in pipes:
            assert end.poll(100), "a rank does not answer"
            found.append([torch.tensor(part) for part in end.recv()])
        for process in processes:
            process.join(20)
    losses, of_x, *of_shares = zip(*found, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks disagree"
    dtype = getattr(torch, setting.dtype)
    return [losses[0].float(), torch.stack(of_x).sum(0), *(torch.cat(parts).to(dtype) for parts in of_shares)]


def _share(rank: int, setting: Setting, store: str, pipe: Any, call: Call | None) -> None:
    die_with_parent()
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=setting.shares)
    share = {"first_class": setting.padded // setting.shares * rank, "group": dist.group.WORLD}
    pipe.send([part.double().tolist() for part in ours(setting, call, **share)])
    dist.destroy_process_group()


def wrong(setting: Setting, call: Call | None = None) -> list[str]:
    """In which results the kernels are worse than twice torch's own error and 1e-5, or than the bound of the type."""
    exact = by_torch(setting, torch.float64)
    eager = by_torch(setting, getattr(torch, setting.dtype))
    try:
        results = ours(setting, call) if setting.shares == 1 else by_ranks(setting, call)
    except AssertionError as error:
        return [str(error)]
    found = []
    for name, mine, theirs, truth in zip(NAMES[: len(exact)], results, eager, exact, strict=True):
        mine = mine[: len(truth)] if "weight" in name else mine  # the truth of the weight has no padding
        error, allowed = ((result.double() - truth).abs().max().item() for result in (mine, theirs))
        if not error <= 2 * allowed + 1e-5:
            found.append(f"{name}: error {error:.2e}, eager {allowed:.2e}")
        bound = BOUNDS[setting.dtype] * (1 if name == "loss" else 2)
        hostile = setting.magnitude > 100 or setting.offset  # where the rounding of the logits is all that there is
        if not hostile and not (mine.double() - truth).norm() <= bound * truth.norm():
            found.append(f"{name}: relative error {((mine.double() - truth).norm() / truth.norm()).item():.2e}")
    if any(part[setting.vocab_size :].any() for part in results[2:]):
        found.append("the padding has a gradient")
    return found


def all_wrong(settings: list[Setting]) -> dict[str, list[str]]:
    """Of many settings, those that are wrong."""
    found = {str(setting): wrong(setting) for setting in settings}
    return {setting: errors for setting, errors in found.items() if errors}


# -- the operators ---------------------------------------------------------------------------------------------------


def widths_apart(dtype: str, magnitude: float, offset: float) -> list[float]:
    """Relative errors of statistics and error of the slope of logits whose rows lie apart and begin anywhere; what lies
    between must stay."""
    memory = torch.full((9, 41), 7.25, dtype=getattr(torch, dtype))
    logits = memory[1:8, 3:36]  # 33 classes, of which 30 are real
    logits.copy_(torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * magnitude + offset)
    targets, before = torch.arange(7) * 4, logits[:, :30].double()
    guards = memory.clone()
    with mock.patch.object(cross_entropy_triton, "BLOCK", 16):
        found = torch.ops.kernels.softmax_statistics(logits, targets, 0, 30, True)
        torch.ops.kernels.cross_entropy_slope(logits, found, targets, torch.ones(7), 0, 30, 30, 0.0, 0.0)
    wanted = before.softmax(-1) - F.one_hot(targets, 30)
    guards[1:8, 3:36] = logits
    assert torch.equal(guards, memory) and not logits[:, 30:].any()
    highest = before.amax(1)
    rows = (highest, (before - highest[:, None]).exp().sum(1), before.gather(1, targets[:, None])[:, 0], before.sum(1))
    errors = [((mine.double() - truth).norm() / truth.norm()).item() for mine, truth in zip(found, rows, strict=True)]
    return [*errors, (logits[:, :30].double() - wanted).abs().max().item()]


def far_apart() -> float:
    """Error with rows 2^30 elements apart, so that the third begins beyond 32 bits: of the addresses a page is touched."""
    step, classes = 2**30 + 64, 20
    logits = torch.empty(2 * step + classes, dtype=torch.float16).as_strided((3, classes), (step, 1))
    logits.copy_(torch.randn(3, classes, generator=torch.Generator().manual_seed(1)))
    close, targets = logits.clone(), torch.tensor([3, 0, 19])
    results = []
    for x in (logits, close):
        found = torch.ops.kernels.softmax_statistics(x, targets, 0, classes, False)
        torch.ops.kernels.cross_entropy_slope(x, found, targets, torch.ones(3), 0, classes, classes, 0.0, 0.0)
        results.append(x.double())
    return (results[0] - results[1]).abs().max().item()


def opcheck() -> set[str]:
    """torch.library.opcheck of both operators: schema (what is mutated), fake tensors, tracing by AOTAutograd."""
    logits, targets = torch.randn(5, 24), torch.arange(5)
    found = torch.ops.kernels.softmax_statistics(logits, targets, 0, 20, True)
    arguments = (logits, found, targets, torch.ones(5), 0, 20, 20, 0.1, 1e-4)
    results = [
        torch.library.opcheck(torch.ops.kernels.softmax_statistics.default, (logits, targets, 0, 20, True)),
        torch.library.opcheck(torch.ops.kernels.cross_entropy_slope.default, arguments),
    ]
    return {result for found in results for result in found.values()}


def compiled(setting: Setting) -> tuple[float, list[str]]:
    """Largest difference of a compiled call's results (one graph, or it raises) from an eager one's, and the kernels that
    the compiled one launched, forward with gradients and without."""
    expected = ours(setting)
    torch.compiler.reset()

    def whole(*arguments: Tensor, **options: Any) -> Tensor:
        return cross_entropy.linear_cross_entropy(*arguments, **options) * 1.0

    call = torch.compile(whole, fullgraph=True, dynamic=False, backend="aot_eager")
    with mock.patch.object(cross_entropy_triton, "launch", wraps=cross_entropy_triton.launch) as launch:
        found = ours(setting, call)
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return difference, [call.args[0] for call in launch.call_args_list]


def launches(setting: Setting) -> list[str]:
    """The kernels that one loss and its gradients launch, then one loss alone."""
    with mock.patch.object(cross_entropy_triton, "launch", wraps=cross_entropy_triton.launch) as launch:
        ours(setting)
    return [call.args[0] for call in launch.call_args_list]


def refusal(dtype: str) -> str:
    return available.unsupported(torch.zeros(1, dtype=getattr(torch, dtype)))


# -- planted faults --------------------------------------------------------------------------------------------------


def wrong_with_fault(path: str, right: str, fault: str, settings: list[Setting]) -> list[list[str]]:
    """For each of the settings, what `wrong` finds with `right`, which must stand once in the file, replaced by `fault`."""
    source = (REPOSITORY / path).read_text()
    assert source.count(right) == 1, f"{path} has {right!r} {source.count(right)} times"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "faulty.py"
        target.write_text(source.replace(right, fault))
        faulty = _loaded(target)
        if path.endswith("triton/cross_entropy.py"):
            with mock.patch.object(kernels.triton, "cross_entropy", faulty, create=True):
                return [wrong(setting) for setting in settings]
        faulty.triton_chunk_rows = lambda *_: settings[0].chunk
        return [wrong(setting, faulty.linear_cross_entropy) for setting in settings]


def _loaded(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("faulty_cross_entropy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
    return module
