"""The rotary positions' Triton kernel in the interpreter: against float64, ragged, by document; and planted faults.

The rule is that of `tests.kernels.nearness`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import rotary_cases as cases
from tests.kernels.rotary_cases import Setting
from tests.kernels.workers import interpret


def assert_right(*wanted: Setting) -> None:
    assert interpret(cases.all_wrong, list(wanted)) == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("placed", [False, True])
def test_it_is_torchs_rotation(dtype: str, placed: bool) -> None:
    assert_right(Setting(dtype=dtype, placed=placed), Setting(dtype=dtype, placed=placed, size=64, elements=2048))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    assert_right(
        Setting(
            batch=data.draw(st.integers(0, 3)),
            length=data.draw(st.integers(1, 5)),
            heads=data.draw(st.integers(1, 7)),
            groups=data.draw(st.integers(1, 4)),
            size=2 * data.draw(st.integers(1, 20)),
            dtype=data.draw(st.sampled_from(["float32", "float16"])),
            placed=data.draw(st.booleans()),
            layout=data.draw(st.sampled_from(["packed", "plain", "transposed"])),
            elements=data.draw(st.sampled_from([1, 16, 2048])),
        )
    )


def test_offsets_have_64_bits() -> None:
    assert interpret(cases.far_apart)


def test_the_operator_is_a_sound_one() -> None:
    assert interpret(cases.opcheck, Setting(placed=True)) == {"SUCCESS"}


def test_compiled_code_holds_it_whole_and_each_pass_is_one_launch() -> None:
    assert interpret(cases.compiled, Setting(placed=True)) == (True, ["rotary_kernel", "rotary_kernel"])


# -- planted faults ------------------------------------------------------------------------------------------------------

PLAIN, PLACED = Setting(), Setting(placed=True)

FAULTS = {  # what is planted: the right text, the fault, and the setting that must show it
    "last head left out": ("mask = (numbers < heads)", "mask = (numbers < heads - 1)", PLAIN),
    "last feature left out": ("(columns < HALF)\n", "(columns < HALF - 1)\n", PLAIN),
    "last tile of heads left out": ("tl.range(0, heads, HEADS)", "tl.range(0, heads - HEADS, HEADS)", PLAIN),
    "the wrong way": ("low * cos - high * sin", "low * cos + high * sin", PLAIN),
    "sine missing": ("high * cos + low * sin", "high * cos", PLAIN),
    "the backward pass turns on": ("if INVERSE:", "if PLACED & INVERSE:", PLAIN),
    "positions not looked at": ("if PLACED:", "if PLACED & INVERSE:", PLACED),
    "positions of the row before": ("positions + token)", "positions + tl.maximum(token - 1, 0))", PLACED),
    "stale row of angles": ("sin + row * HALF", "sin + (row // 2) * HALF", PLAIN),
    "keys by the queries' stride": ("place * k_place", "place * q_place", Setting(layout="plain")),
    "another sequence": ("batch * q_batch", "0 * q_batch", PLAIN),
    "one element": ("        tl.store(there, (low * cos - high * sin)",
                    "        low += tl.where((numbers == 1) & (columns == 3), 1e-3, 0.0)\n"
                    "        tl.store(there, (low * cos - high * sin)", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    right, fault, setting = FAULTS[name]
    assert interpret(cases.wrong_with_fault, right, fault, [setting])[0]


def test_without_a_fault_the_same_settings_are_right() -> None:
    same = "from __future__ import annotations"
    settings = [PLAIN, PLACED, Setting(layout="plain")]
    assert interpret(cases.wrong_with_fault, same, same, settings) == [[]] * len(settings)
