"""AdamW against its formulas in float64 written out here, on torch's path and in Triton's interpreter.

The interpreter widens bfloat16 exactly (tested), but cuts it off where a GPU rounds, so bfloat16 is only read there; that the
compiled kernel rounds is in test_adamw_compiled.py.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import adamw
from kernels.adamw import MOMENTS, AdamW, square_sum
from tests.distributed import die_with_parent, run_python

SIZES = (1, 15, 16, 1023, 1025)
DECAYS = (0.1, 0.1, 0.0, 0.0, 0.1)
BETAS, EPSILON, CLIP = (0.9, 0.95), 1e-8, 1.0
GUARD = 7.25  # what lies between the tensors, and must stay
GAP = 16  # elements of it, at least


class Case(NamedTuple):
    backend: adamw.Backend
    sizes: tuple[int, ...] = SIZES
    gradient: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    copy: torch.dtype | None = None
    shift: int = 0  # elements from a multiple of 16 bytes


class Subject:
    """An optimizer whose tensors lie in one memory with guards between them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.masters = self.placed(torch.float32)
        self.masters = [torch.nn.Parameter(flat) for flat in self.masters]
        values = torch.Generator().manual_seed(1)
        for master in self.masters:
            master.data.copy_(torch.randn(master.shape, generator=values))
            master.grad_dtype = None  # gradients may have another type
        groups = [
            {"params": [m for m, d in zip(self.masters, self.decays, strict=True) if d == decay], "weight_decay": decay}
            for decay in sorted(set(self.decays))
        ]
        self.optimizer = AdamW(groups, 0.0, BETAS, EPSILON, moments=case.moments, backend=case.backend)
        self.optimizer.start_state()
        for name in MOMENTS:
            for master, flat in zip(self.masters, self.placed(case.moments), strict=True):
                self.optimizer.state[master][name] = flat.zero_()
        if case.copy is not None:
            self.optimizer.copies = dict(zip(self.masters, self.placed(case.copy), strict=True))
        for master, flat in zip(self.masters, self.placed(case.gradient), strict=True):
            master.grad = flat.zero_()

    @property
    def decays(self) -> tuple[float, ...]:
        return tuple(DECAYS[number % len(DECAYS)] for number in range(len(self.case.sizes)))

    def placed(self, dtype: torch.dtype) -> list[Tensor]:
        starts, end = [], GAP + self.case.shift
        for size in self.case.sizes:
            starts.append(end)
            end += -(-size // GAP) * GAP + GAP
        memory = torch.full((end,), GUARD, dtype=dtype)
        self.__dict__.setdefault("memories", []).append((memory, starts))
        return [memory[start : start + size] for start, size in zip(starts, self.case.sizes, strict=True)]

    def guards(self) -> list[Tensor]:
        """What lies outside of all tensors."""
        found = []
        for memory, starts in self.memories:  # type: ignore[attr-defined]
            outside = torch.ones(len(memory), dtype=torch.bool)
            for start, size in zip(starts, self.case.sizes, strict=True):
                outside[start : start + size] = False
            found.append(memory[outside])
        return found

    def step(self, gradients: list[Tensor], rate: float, clip: float = CLIP) -> float:
        for master, gradient in zip(self.masters, gradients, strict=True):
            assert master.grad is not None
            master.grad.copy_(gradient)
        norm = self.optimizer.square_sum([master.grad for master in self.masters]).sqrt()  # type: ignore[misc]
        self.optimizer.bound(norm, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return norm.item()

    def held(self) -> list[Tensor]:
        moments = [self.optimizer.state[master][name] for master in self.masters for name in MOMENTS]
        tensors = [*self.masters, *moments, *self.optimizer.copies.values()]
        return [torch.tensor(float(self.optimizer.updates)), *(tensor.detach().clone() for tensor in tensors)]


class Exact:
    """The formulas of Loshchilov and Hutter 2019, algorithm 2, and clipping by the global norm, in float64."""

    def __init__(self, subject: Subject) -> None:
        self.decays, self.updates = subject.decays, 0
        self.start = [master.detach().double().clone() for master in subject.masters]
        self.weights = [weight.clone() for weight in self.start]
        self.first = [torch.zeros_like(weight) for weight in self.start]
        self.second = [torch.zeros_like(weight) for weight in self.start]
        self.largest = [[torch.zeros_like(weight) for weight in self.start] for _ in MOMENTS]

    def step(self, gradients: list[Tensor], rate: float, clip: float = CLIP) -> float:
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        if not math.isfinite(norm):
            return norm
        self.updates += 1
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for number, gradient in enumerate(gradients):
            g = gradient.double() * factor
            self.first[number] = BETAS[0] * self.first[number] + (1 - BETAS[0]) * g
            self.second[number] = BETAS[1] * self.second[number] + (1 - BETAS[1]) * g**2
            mean = self.first[number] / (1 - BETAS[0] ** self.updates)
            square = self.second[number] / (1 - BETAS[1] ** self.updates)
            decay = rate * self.decays[number] * self.weights[number]
            self.weights[number] = self.weights[number] - decay - rate * mean / (square.sqrt() + EPSILON)
            for largest, moment in zip(self.largest, (self.first, self.second), strict=True):
                largest[number] = torch.maximum(largest[number], moment[number].abs())
        return norm


def gradients_of(case: Case, steps: int) -> Iterator[list[Tensor]]:
    """Of changing size, so that some are clipped and some are not."""
    values = torch.Generator().manual_seed(2)
    for number in range(steps):
        scale = (1.0, 0.05, 0.005)[number % 3]
        yield [(torch.randn(size, generator=values) * scale).to(case.gradient) for size in case.sizes]


def rate_of(step: int) -> float:
    return 0.02 * (0.3 + 0.7 * math.cos(step / 60) ** 2)


class Distance(NamedTuple):
    weights: float  # of their distance from the start, relative to it
    moments: float  # the worst element, relative to the largest that it has been
    norms: float  # the worst, relative


def distance(case: Case, steps: int) -> Distance:
    """From the float64 loop after so many steps."""
    subject = Subject(case)
    exact = Exact(subject)
    worst = 0.0
    for number, gradients in enumerate(gradients_of(case, steps)):
        norms = subject.step(gradients, rate_of(number)), exact.step(gradients, rate_of(number))
        worst = max(worst, abs(norms[0] / norms[1] - 1))
    apart = torch.cat([found.double() - wanted for found, wanted in zip(subject.masters, exact.weights, strict=True)])
    moved = torch.cat([wanted - start for wanted, start in zip(exact.weights, exact.start, strict=True)])
    moments = max(
        ((subject.optimizer.state[master][name].double() - moment[number]).abs() / largest[number]).max().item()
        for name, moment, largest in zip(MOMENTS, (exact.first, exact.second), exact.largest, strict=True)
        for number, master in enumerate(subject.masters)
    )
    return Distance((apart.norm() / moved.norm()).item(), moments, worst)


# -- what holds on every backend -------------------------------------------------------------------------------------------


def check_formulas(backend: adamw.Backend) -> None:
    found = distance(Case(backend), 6)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


def check_guards(backend: adamw.Backend) -> None:
    """Nothing beyond a tensor is written; the gradients there are not read, the optimizer's norm shows it."""
    for shift in (0, 1):
        case = Case(backend, (1, 1023, 1025), copy=torch.float16, shift=shift)
        subject = Subject(case)
        exact = Exact(subject)
        for number, gradients in enumerate(gradients_of(case, 2)):
            norms = subject.step(gradients, 0.01), exact.step(gradients, 0.01)
            assert abs(norms[0] / norms[1] - 1) < 1e-6, (number, norms)
        assert all(bool((guard == GUARD).all()) for guard in subject.guards())


def check_clipping(backend: adamw.Backend) -> None:
    """exp_avg is the mean of gradients of norm CLIP, though each step's own norm is another."""
    case = Case(backend, (15, 16))
    subject, average = Subject(case), [torch.zeros(size, dtype=torch.float64) for size in case.sizes]
    for gradients, scale in zip(gradients_of(case, 3), (1.0, 100.0, 1e4), strict=True):
        gradients = [gradient / 0.005 * scale for gradient in gradients]
        norm = subject.step(gradients, 0.01)
        assert norm > CLIP
        average = [0.9 * a + 0.1 * g.double() / norm for a, g in zip(average, gradients, strict=True)]
    for master, wanted in zip(subject.masters, average, strict=True):
        found = subject.optimizer.state[master]["exp_avg"].double()
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def check_skipping(backend: adamw.Backend) -> None:
    """inf and nan change nothing, not the count either, and the next step is what it would have been without them."""
    case = Case(backend, (1, 16, 1025), copy=torch.float16)
    subject, untroubled = Subject(case), Subject(case)
    first, second = gradients_of(case, 2)
    for one in (subject, untroubled):
        one.step(first, 0.01)
    before = subject.held()
    for spoil in (torch.inf, -torch.inf, torch.nan):
        spoiled = [gradient.clone() for gradient in second]
        spoiled[-1][-1] = spoil
        assert not math.isfinite(subject.step(spoiled, 0.01))
        assert all(torch.equal(now, then) for now, then in zip(subject.held(), before, strict=True))
    for one in (subject, untroubled):
        one.step(second, 0.01)
    assert all(torch.equal(now, then) for now, then in zip(subject.held(), untroubled.held(), strict=True))
    assert subject.optimizer.updates == 2


def check_copies(backend: adamw.Backend) -> None:
    case = Case(backend, (15, 1025), copy=torch.float16)
    subject = Subject(case)
    for gradients in gradients_of(case, 2):
        subject.step(gradients, 0.01)
    for master, narrow in subject.optimizer.copies.items():
        assert torch.equal(narrow, master.detach().to(torch.float16)) and narrow.any()


CHECKS: dict[str, Callable[[adamw.Backend], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("name", CHECKS)
def test_torch(name: str) -> None:
    CHECKS[name]("torch")


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_steps_of_torch_are_the_formulas(gradient: torch.dtype) -> None:
    found = distance(Case("torch", gradient=gradient), 100)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


def test_bfloat16_moments_are_off_by_what_their_rounding_explains() -> None:
    found = distance(Case("torch", gradient=torch.bfloat16, moments=torch.bfloat16), 100)
    assert 1e-4 < found.moments < 2**-8 / (1 - BETAS[1])
    assert found.weights < 0.02


def test_on_a_cpu_it_is_bitwise_torchs_own_fused_optimizer() -> None:
    sizes = (3, 70_000, 1025, 16)
    trained = []
    for make in (torch.optim.AdamW, AdamW):
        values = torch.Generator().manual_seed(3)
        weights = [torch.nn.Parameter(torch.randn(size, generator=values)) for size in sizes]
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        options: dict[str, Any] = {} if make is AdamW else {"fused": True}
        optimizer = make(groups, betas=BETAS, eps=EPSILON, **options)
        for number in range(10):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=values)
            norm = square_sum([weight.grad for weight in weights]).sqrt()  # type: ignore[misc]
            if isinstance(optimizer, AdamW):
                optimizer.bound(norm, CLIP)
            else:  # as GradScaler tells it
                optimizer.grad_scale = ((norm + 1e-6) / CLIP).clamp(min=1.0).float()  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["lr"] = rate_of(number)
            optimizer.step()
        trained.append([*weights, *(optimizer.state[weight][name] for weight in weights for name in MOMENTS)])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*trained, strict=True))


# -- what an update is -----------------------------------------------------------------------------------------------------


def test_groups_stepped_one_by_one_are_one_update() -> None:
    """As DeepSpeed does it."""
    case = Case("torch")
    together, apart = Subject(case), Subject(case)
    for number, gradients in enumerate(gradients_of(case, 3)):
        together.step(gradients, rate_of(number))
        with mock.patch.object(AdamW, "step", step_group_by_group(AdamW.step)):
            apart.step(gradients, rate_of(number))
    assert all(torch.equal(one, other) for one, other in zip(together.held(), apart.held(), strict=True))
    assert apart.optimizer.updates == 3 and apart.optimizer.launches == 2 * together.optimizer.launches


def step_group_by_group(step: Any) -> Any:
    def one_by_one(optimizer: AdamW) -> None:
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            step(optimizer)
        optimizer.param_groups = groups

    return one_by_one


def test_an_update_is_not_made_twice_under_one_bound() -> None:
    subject = Subject(Case("torch"))
    subject.step(next(gradients_of(subject.case, 1)), 0.01)
    with pytest.raises(RuntimeError, match=r"call bound\(\) before every update"):
        subject.optimizer.step()


def test_without_a_bound_every_step_is_an_update() -> None:
    case = Case("torch")
    free, clipped = Subject(case), Subject(case)
    for number, gradients in enumerate(gradients_of(case, 3)):
        clipped.step(gradients, rate_of(number), clip=0.0)
        for master, gradient in zip(free.masters, gradients, strict=True):
            master.grad = gradient.clone()
        for group in free.optimizer.param_groups:
            group["lr"] = rate_of(number)
        free.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(free.held(), clipped.held(), strict=True))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_its_state_goes_from_one_to_another(moments: torch.dtype) -> None:
    case = Case("torch", moments=moments)
    first, second = Subject(case), Subject(case)
    steps = list(gradients_of(case, 4))
    for gradients in steps[:3]:
        first.step(gradients, 0.01)
    for ours, theirs in zip(second.masters, first.masters, strict=True):
        ours.data.copy_(theirs.data)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))  # torch shares what it loads
    for subject in (first, second):
        subject.step(steps[3], 0.01)
    assert second.optimizer.updates == 4
    assert all(torch.equal(one, other) for one, other in zip(first.held(), second.held(), strict=True))


# -- backends and mistakes -------------------------------------------------------------------------------------------------


def make(**options: Any) -> AdamW:
    return AdamW([torch.nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, r"cannot run on cpu: .*TRITON_INTERPRET=1.*backend='torch' runs there"),
        ({"backend": "cuda"}, "expected one of auto, triton, torch"),
        ({"moments": torch.bfloat16}, r"betas may be up to 0.984375; found \(0.9, 0.999\)"),
        ({"moments": torch.float16}, "float32 or bfloat16"),
        ({"betas": (0.9, 1.0)}, r"in \[0, 1\)"),
        ({"lr": -1.0}, "lr is 0 or more"),
        ({"eps": float("nan")}, "eps is 0 or more"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("master", "message"),
    [
        (torch.zeros(4, 4).t()[:, :2], "contiguous float32 masters"),
        (torch.zeros(3, dtype=torch.bfloat16), "contiguous float32 masters"),
    ],
)
def test_masters_that_no_backend_steps_are_refused(master: Tensor, message: str) -> None:
    parameter = torch.nn.Parameter(master)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match=message):
        AdamW([parameter]).step()


def test_without_triton_the_reason_is_told() -> None:
    cuda = torch.device("cuda")
    with mock.patch.object(importlib.util, "find_spec", lambda _: None):
        assert adamw.no_triton(cuda) == "triton is not installed"
        with pytest.raises(ValueError, match="triton is not installed"):
            adamw._choose("triton", cuda)
        with pytest.warns(UserWarning, match="torch's fused step on cuda, not its Triton kernels: triton is not"):
            assert adamw._choose("auto", cuda) is None
    assert adamw._choose("auto", torch.device("cpu")) is None


def test_a_cpu_needs_no_triton(tmp_path: Path) -> None:
    (tmp_path / "blocked.py").write_text(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom kernels.adamw import AdamW\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "AdamW([p]).step(); print(p.sum().item() < 3)"
    )
    result = run_python(["blocked"], cwd=tmp_path)
    assert result.stdout.strip() == "True", result.stderr


# -- Triton's interpreter --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[..., Any]]:
    """`interpret(function, *args)` in a process whose Triton interprets; Triton decides that when it is imported."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=die_with_parent)
        pool.submit(torch.set_num_threads, 1).result(120)
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result(240)


def failing(fault: str | None) -> list[str]:
    """The names of the checks that fail on the interpreted kernels, of which one line is wrong."""
    if fault is None:
        return [name for name in CHECKS if fails(name)]
    module, right, wrong = FAULTS[fault]
    original = importlib.import_module(f"kernels.{module}")
    source = Path(str(original.__file__)).read_text()
    assert source.count(right) == 1, right
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module}.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(f"kernels.{module}", path)
        assert spec is not None and spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faulty)
        with (
            mock.patch.dict(sys.modules, {f"kernels.{module}": faulty}),
            mock.patch("kernels." + module, faulty),
            mock.patch.dict(globals(), {"AdamW": faulty.AdamW} if module == "adamw" else {}),
        ):
            return [name for name in CHECKS if fails(name)]


def fails(name: str) -> bool:
    try:
        CHECKS[name]("triton")
    except AssertionError:
        return True
    return False


FAULTS = {
    "no bias correction": ("adamw_triton", "rate = lr / tl.load(corrections)", "rate = lr"),
    "decay in the gradient": (
        "adamw_triton",
        "    w = w * shrink - rate",
        "    g += (1.0 - shrink) * w\n    m += rest1 * (1.0 - shrink) * w\n    w = w - rate",
    ),
    "a stale clip factor": (
        "adamw",
        "self._restart(Bound(divisor,",
        "self._restart(Bound(divisor if self._bound is None else self._bound.divisor,",
    ),
    "one element beyond a block": (
        "adamw_triton",
        "        mask = offsets < numel\n        aligned",
        "        mask = offsets <= numel\n        aligned",
    ),
    "one element beyond a block of the norm": (
        "adamw_triton",
        "    mask = offsets < numel\n    total",
        "    mask = offsets <= numel\n    total",
    ),
    "a step that is not skipped": ("adamw_triton", "if tl.load(skipped) == 0.0:", "if tl.load(skipped) <= 1.0:"),
    "a copy of the old weight": (
        "adamw_triton",
        "_store(copy, COPY, offsets, mask, w, WHOLE)",
        "_store(copy, COPY, offsets, mask, w + rate, WHOLE)",
    ),
}
CAUGHT_BY = {  # and by no other check
    "no bias correction": {"formulas"},
    "decay in the gradient": {"formulas", "clipping"},
    "a stale clip factor": {"formulas", "clipping"},
    "one element beyond a block": {"guards"},
    "one element beyond a block of the norm": {"guards", "formulas"},
    "a step that is not skipped": {"skipping"},
    "a copy of the old weight": {"copies"},
}


def test_triton_keeps_every_check(interpret: Callable[..., Any]) -> None:
    assert interpret(failing, None) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(interpret: Callable[..., Any], fault: str) -> None:
    assert set(interpret(failing, fault)) == CAUGHT_BY[fault]


def test_a_hundred_steps_of_triton_are_the_formulas(interpret: Callable[..., Any]) -> None:
    found = interpret(distance, Case("triton", (15, 1025)), 100)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


@pytest.mark.parametrize("gradient", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_narrow_and_misaligned_gradients(interpret: Callable[..., Any], gradient: torch.dtype, shift: int) -> None:
    found = interpret(distance, Case("triton", (16, 1025, 2048), gradient, shift=shift), 4)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


def widened() -> bool:
    """The sums of the squares of bfloat16 gradients, one element each, are those of their float32 values."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(4)).bfloat16()
    subject = Subject(Case("triton", (1,), torch.bfloat16))
    (master,) = subject.masters
    assert master.grad is not None
    found = []
    for value in values:
        master.grad.fill_(value)
        found.append(subject.optimizer.square_sum([master.grad]))
    return torch.equal(torch.stack(found), values.float().square().double())


def test_the_interpreter_widens_bfloat16_exactly(interpret: Callable[..., Any]) -> None:
    assert interpret(widened)


def launches_and_tables() -> tuple[int, list[bool]]:
    """Launches of three steps over two groups; whether each step's table is the one before, the last one's gradients
    having moved."""
    case = Case("triton", (1, 16, 1025))
    subject, tables = Subject(case), []
    for number, gradients in enumerate(gradients_of(case, 3)):
        if number == 2:
            for master in subject.masters:
                master.grad = torch.zeros_like(master)
        subject.step(gradients, 0.01)
        (table,) = subject.optimizer._tables.values()
        tables.append((table.addresses, table.pairs))
    same = [tables[n][0] is tables[n - 1][0] and tables[n][1] is tables[n - 1][1] for n in (1, 2)]
    assert tables[2][1] is tables[1][1]
    return subject.optimizer.launches, same


def test_all_groups_are_one_launch_over_a_table_that_is_kept(interpret: Callable[..., Any]) -> None:
    assert interpret(launches_and_tables) == (3, [True, False])


def norms_of_a_part() -> tuple[list[float], float]:
    """Twice the sum of squares of two of the tensors' gradients, and in float64."""
    subject = Subject(Case("triton", (1023, 16, 1025)))
    for master, gradient in zip(subject.masters, next(gradients_of(subject.case, 1)), strict=True):
        master.grad = gradient
    chosen = [subject.masters[0].grad, subject.masters[2].grad]
    found = [subject.optimizer.square_sum(chosen).item() for _ in range(2)]  # type: ignore[arg-type]
    return found, sum(gradient.double().square().sum().item() for gradient in chosen if gradient is not None)


def test_the_norm_of_some_gradients_is_float64s_and_the_same_bits_again(interpret: Callable[..., Any]) -> None:
    found, exact = interpret(norms_of_a_part)
    assert found[0] == found[1] and abs(found[0] / exact - 1) < 1e-6
