"""Who computes attention: what each backend refuses, what `auto` takes, and that all give what the reference gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention_triton, backends, libraries
from kernels.attention import attention
from kernels.backends import BACKENDS, PREFERRED, Backend, Backends, Call, Refused, attend, refusal
from kernels.noise import sample_keys

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = Call(heads=4, groups=2, size=64, length=256, total=256)
LIBRARIES: tuple[Backend, ...] = ("cudnn", "flash", "varlen")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on an H100 with a new cuDNN, Triton, and without FlashAttention-3."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    monkeypatch.setattr(backends, "_triton", lambda *_: iter(()))
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda *_: iter(()))
    monkeypatch.setattr(libraries, "has_flash_3", lambda: False)
    return monkeypatch


# -- what is refused -----------------------------------------------------------------------------------------------

ANY_CALL = st.builds(
    Call,
    heads=st.just(4),
    groups=st.sampled_from([1, 4]),
    size=st.sampled_from([16, 20, 64, 128, 256, 512]),
    length=st.sampled_from([1, 256]),
    total=st.sampled_from([1, 256]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 64]),
    documents=st.booleans(),
    biased=st.booleans(),
    dropout=st.booleans(),
    softcap=st.booleans(),
)


@given(call=ANY_CALL, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_library_is_given_dropout_a_bias_or_a_cap(call: Call, dtype: torch.dtype) -> None:
    """Its mask would change with the layout (P4)."""
    if call.dropout or call.biased or call.softcap:
        assert all(refusal(name, call, CPU, dtype) for name in LIBRARIES)
    assert not refusal("torch", call, CPU, dtype)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_on_a_gpu_too_dropout_is_the_reason_a_library_is_refused_for(gpu: pytest.MonkeyPatch, backend: Backend) -> None:
    assert refusal(backend, PLAIN, GPU, torch.bfloat16) == ""
    assert "dropout would change with the layout" in refusal(backend, PLAIN._replace(dropout=True), GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("cudnn", {"documents": True}, "documents"),
        ("cudnn", {"window": 8}, "window"),
        ("cudnn", {"size": 20}, "found 20"),
        ("cudnn", {"size": 256}, "found 256"),
        ("cudnn", {"total": 512}, "different lengths"),
        ("flash", {"documents": True}, "documents"),
        ("flash", {"window": 8}, "window"),
        ("flash", {"size": 264}, "found 264"),
        ("varlen", {"biased": True}, "position biases"),
        ("varlen", {"softcap": True}, "soft cap"),
        ("varlen", {"documents": True, "total": 300}, "different lengths"),
    ],
)
def test_each_refusal_names_its_reason(
    gpu: pytest.MonkeyPatch, backend: Backend, change: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(backend, PLAIN._replace(**change), GPU, torch.bfloat16)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_single_precision_and_old_devices_are_refused_on_a_gpu(gpu: pytest.MonkeyPatch, backend: Backend) -> None:
    assert "not in float32" in refusal(backend, PLAIN, GPU, torch.float32)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0 or later" in refusal(backend, PLAIN, GPU, torch.bfloat16)


def test_an_old_cudnn_is_refused_with_its_version(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert "90100" in refusal("cudnn", PLAIN, GPU, torch.bfloat16)


def test_triton_is_refused_for_what_its_kernels_refuse() -> None:
    q = torch.empty(1, 1, 1, 16)
    assert refusal("triton", PLAIN, CPU, torch.float32) == attention_triton.unsupported(q, q, q) != ""


def test_a_wish_that_cannot_be_met_names_the_reason_and_who_can() -> None:
    with pytest.raises(Refused, match=r"cudnn cannot .*: cuDNN runs on NVIDIA GPUs, not on cpu\. flash, torch can"):
        Backends("cudnn").choose(PLAIN)
    with pytest.raises(Refused, match=r"dropout would change with the layout\. torch can"):
        Backends("flash").choose(PLAIN._replace(dropout=True))


# -- what `auto` takes ---------------------------------------------------------------------------------------------


def test_every_row_of_the_table_ends_with_what_can_do_everything() -> None:
    for row in PREFERRED.values():
        assert row[-1] == "torch" and set(row) <= {*BACKENDS, "flash3"} and len(set(row)) == len(row)


def test_a_cpu_takes_torch_and_passes_nobody_over() -> None:
    chooser = Backends("auto")
    assert chooser.choose(PLAIN) == "torch" and (chooser.told(), chooser.passed_over()) == ("torch", [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "cudnn"),
        ({"dropout": True}, "triton"),
        ({"biased": True}, "triton"),
        ({"documents": True}, "triton"),
        ({"window": 64}, "triton"),
        ({"size": 256}, "triton"),
    ],
)
def test_hopper_takes_the_first_that_can(gpu: pytest.MonkeyPatch, change: dict[str, Any], expected: str) -> None:
    chooser = Backends("auto", GPU, torch.bfloat16)
    assert chooser.choose(PLAIN._replace(**change)) == expected


def test_whom_auto_passes_over_is_told_with_the_reason(gpu: pytest.MonkeyPatch) -> None:
    chooser = Backends("auto", GPU, torch.bfloat16)
    chooser.choose(PLAIN)
    assert chooser.passed_over() == ["flash3: FlashAttention-3 is not installed"]
    gpu.setitem(backends._REFUSALS, "triton", lambda *_: iter(["triton is not installed"]))
    assert chooser.choose(PLAIN._replace(window=8, dropout=True)) == "torch"
    assert "triton: triton is not installed" in chooser.passed_over()


def test_flash_attention_3_is_switched_on_where_it_is_taken(gpu: pytest.MonkeyPatch) -> None:
    switched: list[bool] = []
    gpu.setattr(libraries, "has_flash_3", lambda: True)
    gpu.setattr(libraries, "use_flash_3", lambda: switched.append(True))
    assert Backends("auto", GPU, torch.bfloat16).choose(PLAIN) == "flash" and switched == [True]
    assert Backends("cudnn", GPU, torch.bfloat16).choose(PLAIN) == "cudnn" and switched == [True]


def test_layers_that_differ_are_told_apart(gpu: pytest.MonkeyPatch) -> None:
    chooser = Backends("auto", GPU, torch.bfloat16)
    for window in (None, 64, None, 64):
        chooser.choose(PLAIN._replace(window=window))
    assert chooser.told() == "cudnn (whole), triton (window 64)"


# -- what they compute ---------------------------------------------------------------------------------------------


def tensors(length: int, total: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 4, 16), (2, total, groups, 16), (2, total, groups, 16), (2, length, 4, 16)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def gradients(backend: Backend, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = attend(backend, *leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, inputs[3])]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("length", "total", "causal"), [(33, 33, True), (33, 33, False), (20, 37, False)])
def test_flash_is_the_reference(length: int, total: int, causal: bool, groups: int) -> None:
    inputs, keys = tensors(length, total, groups), sample_keys(1, torch.arange(2))
    place = {"causal": causal, "keys": keys, "site": 3, "first_head": 2, "dropout": 0.0}
    # Slopes of zero take the reference off the path that is the library itself.
    same(gradients("flash", inputs, **place), gradients("torch", inputs, **place, slopes=torch.zeros(4)))


def one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    *_: int,
    window_size: tuple[int, int],
    **options: Any,
) -> Tensor:
    """What torch documents of varlen_attn: each sequence by itself; keys up to `left` before and `right` after are seen."""
    out = []
    for i in range(len(ends) - 1):
        rows, columns = slice(ends[i], ends[i + 1]), slice(key_ends[i], key_ends[i + 1])
        queries, keys, values = q[rows], k[columns], v[columns]
        ratio = queries.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(ratio, dim=1) for x in (keys, values))
        scores = torch.einsum("snd,tnd->nst", queries, keys) / q.shape[2] ** 0.5
        far = torch.arange(len(keys))[None, :] - torch.arange(len(queries))[:, None]
        left, right = (len(k) if reach < 0 else reach for reach in window_size)
        scores = scores.masked_fill((far < -left) | (far > right), -torch.inf)
        out.append(torch.einsum("nst,tnd->snd", scores.softmax(dim=-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("packed", [True, False])
def test_varlen_is_told_of_documents_and_windows_as_torch_documents_them(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, packed: bool
) -> None:
    """torch's varlen_attn runs on GPUs alone: here stands a loop over its sequences in its place."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", one_by_one)
    inputs = tensors(30, 30, 2)
    documents = torch.tensor([[0] * 7 + [1] * 22 + [0], [5] * 30], dtype=torch.int32) if packed else None
    options = {"causal": causal, "window": window, "documents": documents}
    same(gradients("varlen", inputs, **options), gradients("torch", inputs, **options))


def test_varlen_takes_keys_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", one_by_one)
    inputs = tensors(20, 37, 4)
    same(gradients("varlen", inputs, causal=False), gradients("torch", inputs, causal=False))


@pytest.mark.parametrize(
    ("option", "value"),
    [("slopes", torch.ones(4)), ("window", 3), ("softcap", 2.0), ("first_query", 1), ("dropout", 0.1)],
)
def test_a_library_is_never_called_with_what_it_would_leave_out(option: str, value: Any) -> None:
    inputs = tensors(8, 8, 4)
    with pytest.raises(Refused, match=option):
        attend("flash", *inputs[:3], **{option: value})
    assert attention(*inputs[:3], causal=True).shape == (2, 8, 4, 16)
