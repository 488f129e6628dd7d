"""How valid bytes become others: Hypothesis draws the changes, so that it can shrink what fails to the least of them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

INTEGERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
WORDS = [
    b"\0",
    b"\xff",
    b"\x80",
    b"../",
    b"/etc/passwd",
    b"{",
    b"[",
    b"]",
    b"\\ud800",
    b"9" * 30,
    b"-1",
    b"NaN",
    b"\r\n",
    b" ",
]
LEAVES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, "", "x", "../x", "0" * 64, [], {}, [1], {"a": 1}]


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after one to four changes: other numbers, words, holes, copies, ends."""
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(raw) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 512, 4096]))
        match draw(st.sampled_from(["bit", "number", "word", "hole", "copy", "end", "swap", "bytes"])):
            case "bit":
                raw[start : start + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in raw[start : start + 1])
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                value = draw(st.sampled_from(INTEGERS)) % 256**size
                raw[start : start + size] = value.to_bytes(size, draw(st.sampled_from(["little", "big"])))
            case "word":
                word = draw(st.sampled_from(WORDS))
                raw[start : start + draw(st.sampled_from([0, len(word)]))] = word
            case "hole":
                del raw[start : start + length]
            case "copy":
                raw[start:start] = raw[start : start + length]
            case "end":
                del raw[start:]
            case "swap":
                place = draw(st.integers(0, max(len(raw) - 1, 0)))
                first, second = raw[start : start + length], raw[place : place + length]
                raw[start : start + length], raw[place : place + length] = second, first
            case _:
                raw[start : start + length] = draw(st.binary(max_size=8))
    return bytes(raw)


@st.composite
def changed_tar(draw: st.DrawFn, data: bytes) -> bytes:
    """The same for a tar, whose headers then mostly have right checksums again, so that what they say is looked at."""
    raw = bytearray(draw(changed(data)))
    if draw(st.integers(0, 3)):
        for start in range(0, len(raw) - 511, 512):
            if raw[start + 257 : start + 262] == b"ustar":
                raw[start + 148 : start + 156] = b" " * 8
                raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    return bytes(raw)


@st.composite
def changed_json(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes changed, or one value in place of another, in the same spelling."""
    if draw(st.booleans()):
        return draw(changed(data))
    value = json.loads(data)
    place, key = value, draw(st.sampled_from(sorted(value)))
    while isinstance(inner := place[key], dict | list) and inner and draw(st.booleans()):
        place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    place[key] = draw(st.sampled_from(LEAVES))
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
