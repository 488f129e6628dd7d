"""AdamW on torch's path, its state, its backends and mistakes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import adamw, available
from kernels.adamw import MOMENTS, AdamW, square_sum
from tests.distributed import run_python
from tests.kernels.adamw_cases import BETAS, CHECKS, CLIP, EPSILON, Case, Subject, distance, gradients_of, rate_of


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
        ({"backend": "triton"}, r"cannot run on cpu: .*TRITON_INTERPRET=1.*torch can"),
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
        assert available.no_triton(cuda) == "triton is not installed"
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
