"""Faults planted in the Triton attention kernels, copied: each is found by comparison with the definition in float64."""

from __future__ import annotations

import pytest

from kernels.relative import t5_buckets
from tests.kernels import flash_cases as cases
from tests.kernels.flash_cases import Setting
from tests.kernels.workers import interpret

pytestmark = pytest.mark.thorough
EDGES = tuple(t5_buckets(8, 20)[0].tolist())
PLAIN = Setting(33, 33)
WINDOW = Setting(34, 34, window=5, heads=1)
DOCUMENTS = Setting(40, 40, heads=1, causal=False, documents=(16, 17, 7))
CAPPED = Setting(33, 33, softcap=0.7)
BIASED = Setting(18, 18, heads=4, groups=2, slopes=True)
DROPPED = Setting(20, 37, first_query=3, first_head=5, dropout=True, causal=False)
BLIND = Setting(40, 20, window=4, first_query=18)
UNDERFLOW = Setting(17, 17, offset=6.0, heads=1)
RAGGED = Setting(17, 17, heads=1, causal=False, dtype="float16")
# With a relative bias:
FULL = Setting(40, 40, causal=False, edges=EDGES)
LATE = Setting(20, 50, causal=False, edges=EDGES, first_query=12)
SHARED = Setting(18, 18, causal=False, edges=EDGES, heads=4, groups=2)
SKIPPED = Setting(40, 40, causal=False, edges=EDGES, documents=(16, 17, 7), heads=1)

FAULTS = {  # what is planted: module, the right text, the fault, and the setting that must show it
    "one element": (
        "attention_forward",
        "store_tile(out, acc,",
        "store_tile(out, acc + 1e-3 * ((rows[:, None] == 17) & (tl.arange(0, WIDTH)[None, :] == 3)).to(tl.float32),",
        PLAIN,
    ),
    "causal edge": ("attention", "places + 1)", "places + 2)", PLAIN),
    "causal edge of the keys' walk": ("attention", "first = tl.maximum(first, own)", "first = own - 1", PLAIN),
    "window edge": ("attention", "places - window + 1", "places - window", WINDOW),
    "window edge of the keys' walk": ("attention", "last = tl.minimum(last, own + window)", "last += 0", WINDOW),
    "document edge": ("attention", "tl.load(high + rows)", "tl.load(high + rows) + 1", DOCUMENTS),
    "document edge of the keys' walk": (
        "attention",
        "last = tl.minimum(last, tl.load(high + columns))",
        "last = tl.minimum(last, tl.load(high + columns) + 1)",
        DOCUMENTS,
    ),
    "keys beyond the end": ("attention", "tl.zeros_like(rows) + T", "tl.zeros_like(rows) + T + 1", RAGGED),
    "a block taken as seen whole": ("attention", "tl.cdiv(tl.max(first, 0), BLOCK) * BLOCK", "tl.min(first, 0)", WINDOW),
    "a block skipped": ("attention", "start = tl.min(first, 0) // BLOCK", "start = (1 + tl.min(first, 0) // BLOCK)", WINDOW),
    "stale maximum": ("attention_forward", "        maximum = higher\n", "", PLAIN),
    "sum not rescaled": ("attention_forward", "total * shrink", "total", PLAIN),
    "accumulator not rescaled": ("attention_forward", "acc * shrink[:, None]", "acc", PLAIN),
    "maximum missing in lse": ("attention_forward", "maximum + tl.log2(total)", "tl.log2(total)", UNDERFLOW),
    "empty row divided by": ("attention_forward", "total = tl.where(seen, total, 1.0)", "seen = total > -1.0", BLIND),
    "scale missing in dK": ("attention_backward", "sum_k * (scale * 0.69", "sum_k * (1.0 + 0.0 * 0.69", PLAIN),
    "scale missing in dQ": ("attention_backward", "acc * (scale * 0.69", "acc * (1.0 + 0.0 * 0.69", PLAIN),
    "scale missing in dV": ("attention_backward", "sum_v * keep_scale", "sum_v", DROPPED),
    "delta missing in dQ": ("attention_backward", "(product - delta[:, None])", "product", PLAIN),
    "soft cap's slope missing": ("attention_backward", "product * (1.0 - ratio * ratio)", "product", CAPPED),
    "slope of another head": ("attention_backward", "tl.load(slopes + head)", "tl.load(slopes + 0)", BIASED),
    "group of another head": ("attention_forward", "group = head // ratio", "group = head % (N // ratio)", BIASED),
    "heads of a group left out": ("attention_backward", "tl.range(0, ratio)", "tl.range(0, 1)", BIASED),
    "dropout of another head": ("attention_backward", "head + first_head", "head", DROPPED),
    "dropout of another place": ("attention_forward", "site), rows + first_query)", "site), rows)", DROPPED),
    "another hash": ("noise", "0x31848BAB", "0x31848BAD", DROPPED),
    "dropped weights in the sum": (
        "attention_forward",
        "        total = total * shrink + tl.sum(weights, 1)\n        if DROPOUT:\n"
        "            weights = tl.where(kept(noise[:, None], columns[None, :], threshold), weights, 0.0)\n",
        "        if DROPOUT:\n"
        "            weights = tl.where(kept(noise[:, None], columns[None, :], threshold), weights, 0.0)\n"
        "        total = total * shrink + tl.sum(weights, 1)\n",
        DROPPED,
    ),
    # Of a relative bias:
    "bias of another head": (
        "attention",
        "tl.cast(head, tl.int64) * bias[1]",
        "tl.cast(head * 0, tl.int64) * bias[1]",
        FULL,
    ),
    "bias of another distance": ("attention", "(S - 1 + MARGIN)", "(S + MARGIN)", FULL),
    "a near tile taken as far to the left": ("attention", "distance + COLUMNS - 1 <", "distance <", FULL),
    "a near tile taken as far to the right": ("attention", "distance - ROWS + 1 >=", "distance >=", FULL),
    "far tiles by another place": ("attention", "at - begin - first_query", "at - begin", LATE),
    "missing in the forward": (
        "attention_forward",
        "        if BIAS:\n            scores",
        "        if False:\n            scores",
        FULL,
    ),
    "missing in dK and dV": (
        "attention_backward",
        "        if BIAS:\n            whole",
        "        if False:\n            whole",
        FULL,
    ),
    "missing in dQ": ("attention_backward", "    if BIAS:\n        whole", "    if False:\n        whole", FULL),
    "a bucket's end off by one": ("attention_bias", "distance < tl.load(limits", "distance <= tl.load(limits", FULL),
    "a bucket's begin off by one": ("attention_bias", "distance >= tl.load(limits", "distance > tl.load(limits", FULL),
    "a bucket left out": ("attention_bias", "tl.range(lowest_bucket,", "tl.range(lowest_bucket + 1,", FULL),
    "a tile left out": ("attention_bias", "tl.maximum(0, -diagonal)", "tl.maximum(1, -diagonal)", FULL),
    "the last tile left out": ("attention_bias", "tl.cdiv(S, BLOCK_M)", "S // BLOCK_M", FULL),
    "tiles of two documents left out": (
        "attention_bias",
        "tl.maximum(first, at), 0) > 0",
        "tl.maximum(first, at), 0) > 15",
        SKIPPED,
    ),
    "buckets by another place": ("attention_bias", "diagonal * BLOCK_N - first_query", "diagonal * BLOCK_N", LATE),
    "sums of another head": (
        "attention_bias",
        "+ batch) * N + head) * BUCKETS",
        "+ batch) * N + (N - 1 - head)) * BUCKETS",
        FULL,
    ),
    "keys of another head": ("attention_bias", "head, head // ratio, begin", "head, 0, begin", SHARED),
    "not of the last query's mask": (
        "attention_bias",
        "visible_keys(rows,",
        "visible_keys(rows + 1,",
        FULL._replace(causal=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    module, right, fault, setting = FAULTS[name]
    assert interpret(cases.wrong_with_fault, module, right, fault, [setting])[0]


def test_without_a_fault_the_same_settings_are_right() -> None:
    """What finds the faults finds nothing in the kernels copied unchanged."""
    settings = list(dict.fromkeys(setting for *_, setting in FAULTS.values()))
    found = interpret(cases.wrong_with_fault, "noise", "0x31848BAB", "0x31848BAB", settings)
    assert found == [[]] * len(settings)
