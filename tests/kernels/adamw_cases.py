"""What AdamW must keep on every backend: its formulas in float64, written out here, and checks by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import adamw
from kernels.adamw import MOMENTS, AdamW

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
