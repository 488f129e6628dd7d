"""The loss's Triton kernels in the interpreter: against float64, cut over ranks, under torch.compile; and planted faults.

Rule: error <= twice that of torch's cross-entropy in the same type + 1e-5, and a relative error within the type's bound.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed import run_python
from tests.kernels import cross_entropy_cases as cases
from tests.kernels.cross_entropy_cases import Setting
from tests.kernels.workers import interpret

BOTH: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.01}


def assert_right(*wanted: Setting) -> None:
    assert interpret(cases.all_wrong, list(wanted)) == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("added", [{}, {"smoothing": 0.1}, {"z_loss": 0.01}, BOTH])
def test_it_is_torchs_cross_entropy_with_what_is_added(added: dict[str, float], dtype: str) -> None:
    whole, chunks = Setting(dtype=dtype, **added), Setting(dtype=dtype, chunk=5, ignored="none", **added)
    assert_right(whole, chunks, chunks._replace(biased=True))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 70))
    assert_right(
        Setting(
            rows=data.draw(st.integers(1, 20)),
            vocab_size=vocab_size,
            padded=vocab_size + data.draw(st.sampled_from([0, 1, 15, 40])),
            hidden=data.draw(st.integers(1, 20)),
            dtype=data.draw(st.sampled_from(["float32", "float16"])),
            smoothing=data.draw(st.sampled_from([0.0, 0.1])),
            z_loss=data.draw(st.sampled_from([0.0, 0.01])),
            chunk=data.draw(st.sampled_from([1, 7, 1000])),
            block=data.draw(st.sampled_from([16, 32, 4096])),
            ignored=data.draw(st.sampled_from(["some", "none"])),
            layout=data.draw(st.sampled_from(["plain", "odd", "transposed"])),
        )
    )


@pytest.mark.parametrize("added", [{}, BOTH])
def test_hostile_numbers_are_no_worse_than_torchs(added: dict[str, float]) -> None:
    """In float16 torch's own loss of logits of 1e4 overflows: for these see below."""
    loud, high, low = Setting(magnitude=1e4, **added), Setting(offset=1e4, **added), Setting(offset=-200.0, **added)
    assert_right(loud, high, low, low._replace(dtype="float16"))


def test_where_all_targets_are_ignored_loss_and_gradients_are_zero() -> None:
    for found in interpret(cases.ours, Setting(ignored="all", **BOTH)):
        assert not found.any() and not found.isnan().any()


def test_one_class_and_padding_alone_have_no_loss() -> None:
    loss, *gradients = interpret(cases.ours, Setting(vocab_size=1, padded=8))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("magnitude", "offset"), [(1.0, 0.0), (1e4, 0.0), (1.0, 1e4), (1.0, -1e4)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_may_lie_anywhere_and_what_is_between_them_stays(dtype: str, magnitude: float, offset: float) -> None:
    *statistics, slope = interpret(cases.widths_apart, dtype, magnitude, offset)
    assert max(statistics) < 1e-6 and slope < (1e-6 if dtype == "float32" else 1e-3)


def test_offsets_have_64_bits() -> None:
    assert interpret(cases.far_apart) == 0.0


# -- the vocabulary cut over ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [{}, BOTH])
@pytest.mark.parametrize("shares", [2, 4])
def test_a_vocabulary_cut_over_ranks_changes_nothing(shares: int, added: dict[str, float]) -> None:
    """Real processes over gloo; of 17 classes in 64 rows some ranks have padding alone, of 50 the last has some."""
    assert_right(*(Setting(vocab_size=size, shares=shares, chunk=5, biased=size == 17, **added) for size in (50, 17)))


def test_large_logits_of_a_cut_vocabulary() -> None:
    assert_right(Setting(shares=2, magnitude=1e4, **BOTH), Setting(shares=2, dtype="float16", offset=-200.0))


# -- the operators -------------------------------------------------------------------------------------------------------


def test_the_operators_are_sound_ones() -> None:
    assert interpret(cases.opcheck) == {"SUCCESS"}


def test_compiled_code_holds_them_whole() -> None:
    """fullgraph: no break of the graph, forward or backward."""
    difference, launched = interpret(cases.compiled, Setting(chunk=7, **BOTH), timeout=300)
    assert difference == 0.0
    assert launched == interpret(cases.launches, Setting(chunk=7, **BOTH))


def test_a_chunk_launches_one_kernel_forward_and_one_for_its_slope() -> None:
    """And the loss that is taken again without gradients the first alone."""
    both, first = ["statistics_kernel", "slope_kernel"], ["statistics_kernel"]
    assert interpret(cases.launches, Setting(rows=13, chunk=5)) == [*both * 3, *first * 3]


def test_bfloat16_is_refused_where_it_is_wrong() -> None:
    assert interpret(cases.refusal, "bfloat16") == "Triton's interpreter is wrong about bfloat16"
    assert interpret(cases.refusal, "float64") == "they take float32, float16 and bfloat16, not float64"
    assert interpret(cases.refusal, "float32") == ""


def test_without_triton_the_reason_is_told() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.available import unsupported\n"
        "print(unsupported(torch.zeros(1)))"
    )
    assert run_python(["timeit", "-n1", "-r1", code]).stdout.startswith("triton is not installed")


# -- planted faults ------------------------------------------------------------------------------------------------------

PLAIN = Setting(ignored="none")
MASKED = Setting()
SMOOTHED = Setting(smoothing=0.1, ignored="none")
Z_LOSS = Setting(z_loss=0.01)
LOW = Setting(offset=-200.0)
CUT = Setting(shares=2, chunk=5, **BOTH)
WHOLE_BLOCKS = Setting(vocab_size=64, padded=64, smoothing=0.1)
SETTINGS = [PLAIN, MASKED, SMOOTHED, Z_LOSS, LOW, CUT, WHOLE_BLOCKS]
KERNELS, LOSS = "kernels/triton/cross_entropy.py", "kernels/cross_entropy.py"

FAULTS = {  # what is planted: file, the right text, the fault, and the setting that must show it
    "padding counted": (KERNELS, "tl.where(columns < real, values, float(\"-inf\"))", "values", PLAIN),
    "one class too few": (KERNELS, "tl.where(columns < real, values, float(\"-inf\"))",
                          "tl.where(columns < real - 1, values, float(\"-inf\"))", PLAIN),
    "a class beyond the real ones": (KERNELS, "tl.where(columns < real, values, float(\"-inf\"))",
                                     "tl.where(columns <= real, values, float(\"-inf\"))", PLAIN),
    "stale maximum": (KERNELS, "return higher, total, summed", "return maximum, total, summed", LOW),
    "sum not rescaled": (KERNELS, "total * tl.exp(maximum - higher) +", "total +", PLAIN),
    "last block left out": (KERNELS, "if whole < real:", "if whole > real:", PLAIN),
    "last block's slope left out": (KERNELS, "tl.range(whole, width, BLOCK)", "tl.range(width, width, BLOCK)", PLAIN),
    "target one off": (KERNELS, "columns == target,", "columns == target + 1,", PLAIN),
    "target's logit one off": (KERNELS, "tl.load(line + target, mask=ours", "tl.load(line + target - 1, mask=ours", PLAIN),
    "another rank's target taken": (KERNELS, "(target >= 0) & (target < real)", "(target >= 0) | (target < real)", CUT),
    "slope not divided": (KERNELS, "tl.log(total))) / total", "tl.log(total)))", PLAIN),
    "mask missing in the softmax": (KERNELS, "scale = count * (", "scale = (", MASKED),
    "mask missing at the target": (KERNELS, "taken = confidence * count", "taken = confidence", MASKED),
    "mask missing in the smoothing": (KERNELS, "share = share * count", "share = share + 0.0 * count", WHOLE_BLOCKS),
    "confidence missing": (KERNELS, "taken = confidence * count", "taken = count", SMOOTHED),
    "smoothing's share missing": (KERNELS, "slope -= share if WHOLE", "slope -= 0.0 if WHOLE", SMOOTHED),
    "smoothing's share of the last block missing": (KERNELS, "tl.where(columns < real, share, 0.0)", "0.0", SMOOTHED),
    "padding in the sum of logits": (KERNELS, "tl.where(columns < real, values, 0.0)",
                                     "tl.where(columns < real, values, 30.0)", SMOOTHED),
    "z-loss's slope missing": (KERNELS, "2.0 * z_loss * (", "0.0 * z_loss * (", Z_LOSS),
    "logarithm missing in z-loss's slope": (KERNELS, "(maximum + tl.log(total))", "(maximum)", Z_LOSS),
    "one element": (KERNELS, "        tl.store(line + columns, slope.to(logits.dtype.element_ty))\n",
                    "        slope += tl.where((row == 3) & (columns == 5), 1e-3, 0.0)\n"
                    "        tl.store(line + columns, slope.to(logits.dtype.element_ty))\n", PLAIN),
    "ranks' sums of another maximum": (LOSS, "found[1] * torch.exp(found[0] - highest)", "found[1]", CUT),
    "ranks' maximum not shared": (LOSS, "_reduced(found[0].clone(), rules.group, torch.distributed.ReduceOp.MAX)",
                                  "found[0].clone()", CUT),
    "mean over a rank's own classes": (LOSS, "summed / rules.vocab_size", "summed / real", CUT),
    "z-loss missing": (LOSS, "rules.z_loss * log_sum.square()", "0.0 * log_sum.square()", Z_LOSS),
    "maximum missing in the loss": (LOSS, "(highest - at_target) + rest", "rest - at_target", LOW),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    path, right, fault, setting = FAULTS[name]
    assert interpret(cases.wrong_with_fault, path, right, fault, [setting])[0]


@pytest.mark.parametrize("path", [KERNELS, LOSS])
def test_without_a_fault_the_same_settings_are_right(path: str) -> None:
    """What finds the faults finds nothing in a copy of the file that is unchanged."""
    same = "from __future__ import annotations"
    for chunk in {setting.chunk for setting in SETTINGS}:
        chosen = [setting for setting in SETTINGS if setting.chunk == chunk]
        assert interpret(cases.wrong_with_fault, path, same, same, chosen) == [[]] * len(chosen)
