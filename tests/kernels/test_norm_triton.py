"""The norms' Triton kernels in the interpreter: against float64, ragged, their dropout's mask; and planted faults.

The rule is that of `tests.kernels.nearness`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.noise import keep_mask
from kernels.norm import add_norm, norm
from tests.kernels import norm_cases as cases
from tests.kernels.nearness import LAYOUTS
from tests.kernels.norm_cases import Setting
from tests.kernels.workers import interpret


def assert_right(*wanted: Setting) -> None:
    assert interpret(cases.all_wrong, list(wanted)) == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layer", [True, False])
def test_it_is_torchs_norm_of_the_sum(layer: bool, dtype: str) -> None:
    whole = Setting(layer, dtype=dtype)
    assert_right(
        whole,
        whole._replace(added=False),
        whole._replace(dropout=0.0, biased=False),
        whole._replace(used="norm"),
        whole._replace(elements=2048, strips=128, width=64),
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    assert_right(
        Setting(
            layer=data.draw(st.booleans()),
            batch=data.draw(st.integers(0, 3)),
            length=data.draw(st.integers(1, 5)),
            width=data.draw(st.integers(2, 40)),
            dtype=data.draw(st.sampled_from(["float32", "float16"])),
            biased=data.draw(st.booleans()),
            added=data.draw(st.booleans()),
            dropout=data.draw(st.sampled_from([0.0, 0.2])),
            layout=data.draw(st.sampled_from(LAYOUTS)),
            used=data.draw(st.sampled_from(["both", "norm"])),
            elements=data.draw(st.sampled_from([1, 128, 2048])),
            strips=data.draw(st.integers(1, 4)),
            epsilon=1e-2,  # else two features alike, which rounding alone tells apart, would decide
        )
    )


@pytest.mark.parametrize("layer", [True, False])
def test_rows_far_from_zero_are_no_worse_than_torchs(layer: bool) -> None:
    far = Setting(layer, offset=300.0, added=False)
    assert_right(far, far._replace(dtype="float16"), Setting(layer, offset=1e-4, epsilon=1e-12))


def test_offsets_have_64_bits() -> None:
    assert interpret(cases.far_apart)


# -- dropout -------------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_references_under_every_tile_and_layout() -> None:
    """Whole, by another tile, and cut into two slices of the sequence; forward and backward."""
    whole = Setting(batch=3, length=12, width=50, first_row=2)
    keys, rate = cases.keys_of(whole), whole.dropout
    wanted = keep_mask(keys, 5, torch.arange(2, 14), torch.arange(50), rate)
    for setting in (whole, whole._replace(elements=2048), whole._replace(elements=1)):
        assert torch.equal(interpret(cases.masks, setting)[0], wanted)
    slices = [whole._replace(length=5), whole._replace(length=7, first_row=7)]
    assert torch.equal(torch.cat([interpret(cases.masks, part)[0] for part in slices], dim=1), wanted)
    found, count = wanted.float().mean().item(), wanted.numel()
    assert abs(found - (1 - rate)) < 5 * (rate * (1 - rate) / count) ** 0.5
    assert interpret(cases.masks, whole)[1].max() == pytest.approx(1 / (1 - rate))


# -- the operator --------------------------------------------------------------------------------------------------------


def test_the_operator_is_a_sound_one() -> None:
    assert interpret(cases.opcheck, Setting()) == {"SUCCESS"}


@pytest.mark.parametrize("used", ["both", "norm"])
def test_compiled_code_holds_it_whole(used: str) -> None:
    assert interpret(cases.compiled, Setting(used=used)) == (True, ["norm_kernel", "norm_backward_kernel"])


def test_mistakes_are_told() -> None:
    x, weight = torch.ones(1, 2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="dropout needs the sample keys"):
        add_norm(x, x, weight, None, 1e-5, layer=True, dropout=0.1)
    with pytest.raises(ValueError, match=r"triton cannot run on cpu: .*TRITON_INTERPRET.* torch can"):
        norm(x, weight, None, 1e-5, layer=True, backend="triton")
    assert interpret(cases.refusals) == [
        "triton cannot normalise this: rows of at most 8,192 features are supported, found 8,193. torch can",
        "x and residual must be alike, found (1, 2, 4) torch.float32, (1, 2, 4) torch.float16",
    ]


# -- planted faults ------------------------------------------------------------------------------------------------------

LAYER, RMS = Setting(), Setting(layer=False)
ALONE = Setting(added=False)

FAULTS = {  # what is planted: the right text, the fault, and the setting that must show it
    "mask's edge": ("seen = (columns < width)[None, :]", "seen = (columns < width - 1)[None, :]", LAYER),
    "mask's edge in the backward pass": ("seen = columns < width\n", "seen = columns < width - 1\n", LAYER),
    "columns beyond the width in the variance": ("tl.where(seen, values - mean[:, None], 0.0)",
                                                 "values - mean[:, None]", LAYER),
    "scale of dropout missing": ("values = tl.where(stays, values * scale, 0.0)",
                                 "values = tl.where(stays, values, 0.0)", LAYER),
    "scale of dropout missing in the gradient": ("tl.where(stays, slope * scale, 0.0)", "tl.where(stays, slope, 0.0)",
                                                 RMS),
    "dropout of another row": ("row + first_row", "row + first_row + 1", LAYER),
    "dropout of another sample": ("(places // length).to", "(0 * places).to", LAYER),
    "mean of the padded width": ("mean = tl.sum(values, 1) / width", "mean = tl.sum(values, 1) / COLUMNS", LAYER),
    "epsilon missing": ("/ width + epsilon)", "/ width)", Setting(epsilon=0.1)),
    "stale mean": ("values -= tl.load(statistics + places", "values -= tl.load(statistics + places // 2", LAYER),
    "stale deviation": ("statistics + rows + places, mask=places < rows, other=0.0)",
                        "statistics + rows + places // 2, mask=places < rows, other=0.0)", RMS),
    "stale sum of the weight's gradient": ("of_weight += dy * values", "of_weight = dy * values", RMS),
    "a strip's last tile left out": ("tl.minimum((strip + 1) * step, rows), ROWS",
                                     "tl.minimum((strip + 1) * step, rows) - ROWS, ROWS", LAYER),
    "weight missing in the gradient": ("dy *= w\n", "dy *= 1.0\n", ALONE),
    "the row's share of the gradient missing": ("slope = dy - values * (tl", "slope = dy - 0.0 * values * (tl", RMS),
    "the mean's share of the gradient missing": ("slope -= (tl", "slope -= 0.0 * (tl", LAYER),
    "deviation missing in the gradient": ("slope *= inverse", "slope *= 1.0", ALONE),
    "the sum's own gradient missing": ("slope += tl.load(of_total", "slope += 0.0 * tl.load(of_total", LAYER),
    "bias missing": ("values += tl.load(bias", "values += 0.0 * tl.load(bias", LAYER),
    "one element": ("    tl.store(out + into",
                    "    values += tl.where((places[:, None] == 3) & (columns[None, :] == 5), 1e-3, 0.0)\n"
                    "    tl.store(out + into", LAYER),
    "rows of another stride": ("places[:, None] * residual_stride", "places[:, None] * width", Setting(layout="apart")),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    right, fault, setting = FAULTS[name]
    assert interpret(cases.wrong_with_fault, right, fault, [setting])[0]


def test_without_a_fault_the_same_settings_are_right() -> None:
    same = "from __future__ import annotations"
    settings = list(dict.fromkeys(setting for *_, setting in FAULTS.values()))
    assert interpret(cases.wrong_with_fault, same, same, settings) == [[]] * len(settings)
