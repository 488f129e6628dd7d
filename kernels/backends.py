"""Which code computes attention: one choice for each kind of call, made before the run, from a table, never by a timing.

    torch    torch's own operations (`kernels.attention`): everything, everywhere; the reference
    triton   this project's kernels (`kernels.attention_triton`): everything, on NVIDIA GPUs from compute capability 8.0 on
    cudnn    NVIDIA's kernels: whole sequences, causal or not
    flash    FlashAttention (3 where it is installed, on Hopper; else torch's 2; on a CPU torch's): the same
    varlen   FlashAttention over packed documents, and windows

The last three have no dropout: their masks would differ between layouts. What a backend cannot do it refuses with the
reason; `auto` takes the first of PREFERRED that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels import attention_triton, libraries
from kernels.attention import attention

Backend = Literal["triton", "cudnn", "flash", "varlen", "torch"]
Wish = Literal["auto", "triton", "cudnn", "flash", "varlen", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
HALF = (torch.float16, torch.bfloat16)
HOPPER = "cuda 9.0"
TRUSTED_CUDNN = 91500  # 9.15, from which on torch itself prefers it on Hopper


class Call(NamedTuple):
    """What an attention layer asks for at each call of a training step."""

    heads: int
    groups: int  # key/value heads
    size: int  # of a head
    length: int  # queries
    total: int  # keys
    causal: bool = True
    window: int | None = None
    documents: bool = False
    biased: bool = False  # ALiBi's or T5's
    dropout: bool = False
    softcap: bool = False

    @property
    def feature(self) -> str:
        """What most decides who can do it, and how fast."""
        if self.dropout:
            return "dropout"
        if self.biased or self.softcap:
            return "bias"
        if self.documents:
            return "documents"
        return "window" if self.window is not None else "plain"


# By device and feature, the fastest first. flash3 is flash where FlashAttention-3 is installed. The order on GPUs is by
# published numbers (FlashAttention-3's paper; pytorch #142132): none has been timed by this project yet.
PREFERRED: dict[tuple[str, str], tuple[str, ...]] = {
    ("cpu", "any"): ("torch",),
    ("cuda", "any"): ("triton", "torch"),
    ("cuda", "documents"): ("triton", "varlen", "torch"),
    ("cuda", "window"): ("triton", "varlen", "torch"),
    ("cuda", "plain"): ("flash", "triton", "torch"),
    (HOPPER, "plain"): ("flash3", "cudnn", "triton", "flash", "torch"),
    ("cuda 10.0", "plain"): ("cudnn", "triton", "flash", "torch"),
}


class Refused(ValueError):
    """A backend cannot do what is asked of it."""


class Backends:
    """The backends of one model's attention. `chosen` tells, by call, who computes it and why not those preferred.

    documents: whether the model is given documents to keep apart.
    """

    def __init__(
        self,
        wish: Wish = "torch",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        documents: bool = False,
    ) -> None:
        self.wish, self.device, self.dtype, self.documents = wish, torch.device(device), dtype, documents
        self.chosen: dict[Call, tuple[Backend, list[str]]] = {}

    def choose(self, call: Call) -> Backend:
        """Raises Refused if the wish cannot be met."""
        if call not in self.chosen:
            self.chosen[call] = self._choose(call)
        backend = self.chosen[call][0]
        if backend in ("flash", "varlen") and libraries.has_flash_3() and _place(self.device) == HOPPER:
            libraries.use_flash_3()
        return backend

    def _choose(self, call: Call) -> tuple[Backend, list[str]]:
        if self.wish != "auto":
            if reason := refusal(self.wish, call, self.device, self.dtype):
                able = [name for name in BACKENDS if not refusal(name, call, self.device, self.dtype)]
                raise Refused(f"{self.wish} cannot compute this model's attention: {reason}. {', '.join(able)} can")
            return self.wish, []
        passed: list[str] = []
        for name in preferred(call, self.device):
            backend: Backend = "flash" if name == "flash3" else name  # type: ignore[assignment]
            reason = "" if name != "flash3" or libraries.has_flash_3() else "FlashAttention-3 is not installed"
            reason = reason or refusal(backend, call, self.device, self.dtype)
            if not reason:
                return backend, passed
            passed.append(f"{name}: {reason}")
        raise AssertionError("torch can do everything")

    def told(self) -> str:
        """For people: `triton`, or `cudnn, triton (window 1024)` where layers differ."""
        kinds: dict[str, list[str]] = {}
        for call, (backend, _) in self.chosen.items():
            kinds.setdefault(backend, []).append("whole" if call.window is None else f"window {call.window}")
        if len(kinds) < 2:
            return next(iter(kinds), self.wish)
        return ", ".join(f"{backend} ({', '.join(dict.fromkeys(kind))})" for backend, kind in kinds.items())

    def passed_over(self) -> list[str]:
        """For people: whom `auto` would have preferred, and why it did not take it."""
        return list(dict.fromkeys(reason for _, reasons in self.chosen.values() for reason in reasons))


def preferred(call: Call, device: torch.device) -> tuple[str, ...]:
    """Of PREFERRED, from the most special entry to the most general."""
    places = (_place(device), device.type)
    keys = [(place, feature) for place in places for feature in (call.feature, "any")]
    return next((PREFERRED[key] for key in keys if key in PREFERRED), ("torch",))


def _place(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def refusal(backend: Backend, call: Call, device: torch.device, dtype: torch.dtype) -> str:
    """Why the backend cannot compute the call there: one phrase, "" if it can."""
    return next(_REFUSALS[backend](call, device, dtype), "")


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`kernels.attention.attention(q, k, v, **options)` by a backend that does not refuse it."""
    if backend in _KNOWN:
        options = _understood(backend, options)
    return _FUNCTIONS[backend](q, k, v, **options)


# -- what each refuses ---------------------------------------------------------------------------------------------


def _torch(call: Call, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    yield from ()


def _triton(call: Call, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    q = torch.empty(1, 1, call.heads, call.size, device=device, dtype=dtype)
    if reason := attention_triton.unsupported(q, q[:, :, : call.groups], q[:, :, : call.groups]):
        yield reason


def _cudnn(call: Call, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    yield from _gpu_half("cuDNN", device, dtype)
    if (version := torch.backends.cudnn.version() or 0) < TRUSTED_CUDNN:
        yield f"cuDNN is too old ({version}, {TRUSTED_CUDNN} is needed)"
    if call.size % 8 or call.size > 128:
        yield f"heads of a multiple of 8 up to 128 are supported, found {call.size}"
    yield from _whole_sequences("cuDNN", call)


def _flash(call: Call, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    if device.type != "cpu":
        yield from _gpu_half("FlashAttention", device, dtype)
        if call.size > 256:
            yield f"heads of at most 256 are supported, found {call.size}"
    yield from _whole_sequences("FlashAttention", call)


def _varlen(call: Call, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    yield from _gpu_half("torch's varlen_attn", device, dtype)
    if call.size % 8 or call.size > 256:
        yield f"heads of a multiple of 8 up to 256 are supported, found {call.size}"
    if call.length != call.total and (call.causal or call.documents or call.window is not None):
        yield "queries and keys of different lengths are masked otherwise there"
    yield from _undisturbed("torch's varlen_attn", call)


def _gpu_half(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    if device.type != "cuda":
        yield f"{name} runs on NVIDIA GPUs, not on {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        yield f"{name} needs compute capability 8.0 or later"
    if dtype not in HALF:
        yield f"{name} computes in bfloat16 or float16, not in {dtype}".replace("torch.", "")


def _whole_sequences(name: str, call: Call) -> Iterator[str]:
    yield from _undisturbed(name, call)
    if call.documents:
        yield f"{name} cannot keep documents apart without a mask tensor"
    if call.window is not None:
        yield f"{name} has no attention window here"
    if call.causal and call.length != call.total:
        yield "queries and keys of different lengths are masked otherwise there"


def _undisturbed(name: str, call: Call) -> Iterator[str]:
    if call.dropout:
        yield f"{name}'s dropout would change with the layout"
    if call.biased:
        yield f"{name} has no position biases here"
    if call.softcap:
        yield f"{name} has no soft cap here"


_REFUSALS: dict[Backend, Callable[[Call, torch.device, torch.dtype], Iterator[str]]] = {
    "torch": _torch,
    "triton": _triton,
    "cudnn": _cudnn,
    "flash": _flash,
    "varlen": _varlen,
}


# -- the calls -----------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[Backend, Callable[..., Tensor]] = {
    "torch": attention,
    "triton": attention_triton.flash_attention,
    "cudnn": libraries.cudnn_attention,
    "flash": libraries.flash_attention,
    "varlen": libraries.varlen_attention,
}
_OF_DROPOUT = ("keys", "site", "first_head")  # which place a mask's element has: without dropout they mean nothing
_KNOWN = {
    "cudnn": ("causal", "scale", *_OF_DROPOUT),
    "flash": ("causal", "scale", *_OF_DROPOUT),
    "varlen": ("causal", "scale", "window", "documents", *_OF_DROPOUT),
}


def _understood(backend: Backend, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a library's function has. Refused if another is more than nothing: it would be left out."""
    known = _KNOWN[backend]
    strange = [
        name
        for name, value in options.items()
        if name not in known and value is not None and (isinstance(value, Tensor) or value != 0)
    ]
    if strange:
        raise Refused(f"{backend} cannot compute attention with {', '.join(strange)}: it was chosen for another call")
    return {name: options[name] for name in known if name in options and name not in _OF_DROPOUT}
