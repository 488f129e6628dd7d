"""The activations' Triton kernels in the interpreter: against float64, ragged, under torch.compile; and planted faults.

The rule is that of `tests.kernels.nearness`. bfloat16 is left out: what the interpreter loads of it is right, but what it
stores is cut off where a GPU rounds to nearest.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.activation import ACTIVATIONS, activate
from tests.kernels import activation_cases as cases
from tests.kernels.activation_cases import Setting
from tests.kernels.nearness import LAYOUTS
from tests.kernels.workers import interpret


def assert_right(*wanted: Setting) -> None:
    assert interpret(cases.all_wrong, list(wanted)) == {}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_torchs_activation_of_the_sum(name: str) -> None:
    assert_right(
        *(Setting(name, dtype=dtype, biased=biased) for dtype in ("float32", "float16") for biased in (True, False)),
        Setting(name, columns=1024, elements=2048, strips=256),
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    assert_right(
        Setting(
            name=data.draw(st.sampled_from(list(ACTIVATIONS))),
            shape=data.draw(st.lists(st.integers(1, 6), max_size=3).map(tuple)),
            features=data.draw(st.integers(1, 40)),
            dtype=data.draw(st.sampled_from(["float32", "float16"])),
            biased=data.draw(st.booleans()),
            layout=data.draw(st.sampled_from(LAYOUTS)),
            columns=data.draw(st.sampled_from([1, 8, 1024])),
            elements=data.draw(st.sampled_from([8, 64, 2048])),
            strips=data.draw(st.integers(1, 4)),
        )
    )


def test_no_rows_and_no_features() -> None:
    assert interpret(cases.empty, (0, 5)) == [(0, 5), (0, 10), (10,)]
    assert interpret(cases.empty, (3, 0)) == [(3, 0), (3, 0), (0,)]


@pytest.mark.parametrize("name", ["gelu-tanh", "relu", "swiglu"])  # torch's own gelu of infinity is NaN on a CPU
def test_far_numbers_infinities_and_nan_are_torchs(name: str) -> None:
    value, slope, torchs, of_torch = interpret(cases.of, name, [math.nan, math.inf, -math.inf, 1e4, -1e4, -90.0, 0.0])
    assert value == pytest.approx(torchs, nan_ok=True) and slope == pytest.approx(of_torch, nan_ok=True)


def test_offsets_have_64_bits() -> None:
    assert interpret(cases.far_apart)


def test_the_operator_is_a_sound_one() -> None:
    assert interpret(cases.opcheck, Setting("swiglu")) == {"SUCCESS"}


def test_compiled_code_holds_it_whole() -> None:
    assert interpret(cases.compiled, Setting("swiglu")) == (True, ["activation_kernel", "activation_backward_kernel"])


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="'silu': expected one of gelu"):
        activate("silu", torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"a bias of 4 is needed, found \(2,\)"):
        activate("swiglu", torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"triton cannot run on cpu: they take .* not float64. torch can"):
        activate("gelu", torch.ones(2, 4, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match=r"triton cannot run on cpu: .*TRITON_INTERPRET.* torch can"):
        activate("gelu", torch.ones(2, 4), backend="triton")


# -- planted faults ------------------------------------------------------------------------------------------------------

GELU, TANH, SILU, RELU = (Setting(name) for name in ("gelu", "gelu-tanh", "swiglu", "relu"))

FAULTS = {  # what is planted: the right text, the fault, and the setting that must show it
    "mask's edge in the columns": ("mask = (places < rows)[:, None] & (columns < width)[None, :]\n    lines",
                                   "mask = (places < rows)[:, None] & (columns < width - 1)[None, :]\n    lines", GELU),
    "one row too few": ("tl.minimum((strip + 1) * step, rows)", "tl.minimum((strip + 1) * step, rows - 2)", GELU),
    "a strip's last tile left out": ("tl.minimum((strip + 1) * step, rows), ROWS",
                                     "tl.minimum((strip + 1) * step, rows) - ROWS, ROWS", GELU),
    "bias missing": ("x += tl.load(bias + columns", "x += 0.0 * tl.load(bias + columns", GELU),
    "the gate's bias on up": ("bias + width, columns, mask, width, BIASED)\n    tl.store",
                              "bias, columns, mask, width, BIASED)\n    tl.store", SILU),
    "stale sum of the bias' gradient": ("sum_gate += d_gate", "sum_gate = d_gate", GELU),
    "stale sum of up's": ("sum_up += d_up", "sum_up = d_up", SILU),
    "slope of gelu without its density": ("share + x * ROOT_TURN", "share + 0.0 * x * ROOT_TURN", GELU),
    "scale in the normal density": ("-0.5 * x * x", "-0.49 * x * x", GELU),
    "scale in tanh's slope": ("3.0 * CUBIC", "2.9 * CUBIC", TANH),
    "silu's slope": ("share * (1.0 + x * (1.0 - share))", "share * (1.0 + x * share)", SILU),
    "relu's slope": ("tl.where(x <= 0.0, 0.0, 1.0)", "tl.where(x <= -0.1, 0.0, 1.0)", RELU),
    "gate and up exchanged in the gradient": ("d_up = dy * value", "d_up = dy * rise", SILU),
    "up missing in the gate's gradient": ("dy *= up", "dy *= 1.0", SILU),
    "one element": ("    tl.store(out + places[:, None]",
                    "    value += tl.where((places[:, None] == 3) & (columns[None, :] == 5), 1e-3, 0.0)\n"
                    "    tl.store(out + places[:, None]", GELU),
    "rows of another stride": ("grad + places[:, None] * grad_stride", "grad + places[:, None] * width",
                               Setting(layout="apart")),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    right, fault, setting = FAULTS[name]
    assert interpret(cases.wrong_with_fault, right, fault, [setting])[0]


def test_without_a_fault_the_same_settings_are_right() -> None:
    same = "from __future__ import annotations"
    settings = [GELU, TANH, SILU, RELU, Setting(layout="apart")]
    assert interpret(cases.wrong_with_fault, same, same, settings) == [[]] * len(settings)
