"""A tar member's header, checked field by field. Nothing here trusts another reader's idea of what a header may be."""

from __future__ import annotations

import re
import tarfile
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION = 1 << 16  # bytes of a pax header or a long name
UNUSED = ((108, 116), (116, 124), (136, 148), (329, 337), (337, 345))  # user, group, time, device: numbers too
MAGICS = (b"ustar\x0000", b"ustar  \x00")  # of POSIX and of GNU
HARMLESS = re.compile(  # what a pax header may say of a member: when, and whose it is
    rb"[amc]time|[ug](id|name)|comment|(SCHILY|LIBARCHIVE|RHT)\.[ -<>-~]*"
)
SPECIAL = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
}


class Damaged(Exception):
    """Nothing behind this place of the file can be trusted. The message is the reason, for a report."""


class Member(NamedTuple):
    """A header's fields. kind: tar's type flag, of a plain file b"0". size, in bytes, is as declared."""

    name: str
    size: int
    mode: int
    kind: bytes
    user: str


def parse(header: bytes) -> Member:
    """The fields of a header (512 bytes). Raises Damaged for one that no tar program writes."""
    if header[257:265] not in MAGICS:
        raise Damaged("no tar header where a member should begin")
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != found:
        raise Damaged("a tar header with a wrong checksum")
    for begin, end in UNUSED:
        if header[begin] != 0xFF:  # a number below zero, in base 256
            _number(header[begin:end])
    parts = [header[345:500], header[:100]] if header[257:265] == MAGICS[0] else [header[:100]]
    name = b"/".join(part for part in (field.split(b"\0", 1)[0] for field in parts) if part)
    kind = header[156:157].replace(b"\0", b"0").replace(b"7", b"0")  # forms of a plain file
    return Member(
        name=name.decode("utf-8", "backslashreplace"),
        size=_number(header[124:136]),
        mode=_number(header[100:108]),
        kind=kind,
        user=header[265:297].split(b"\0", 1)[0].decode("ascii", "backslashreplace"),
    )


def _number(field: bytes) -> int:
    """A field's number: octal digits, or base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    # No digits behind a zero byte, as readers differ in what such a number is.
    found = re.fullmatch(rb" *([0-7]*)[ \0]*", field)
    if found is None:
        raise Damaged("a tar header with a number that is none")
    return int(found[1] or b"0", 8)


def is_harmless(pax: bytes) -> bool:
    """Whether a pax header's records leave the member's name, size and kind alone. Raises Damaged where they are none."""
    place, harmless = 0, True
    while place < len(pax):
        found = re.compile(rb"(\d{1,6}) ([^=]+)=").match(pax, place)
        end = place + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(pax) or pax[end - 1 : end] != b"\n":
            raise Damaged("a pax header that is none")
        harmless = harmless and HARMLESS.fullmatch(found[2]) is not None
        place = end
    return harmless


def problem_of(name: str) -> str | None:
    """Why a member's name could lead out of a folder, or is none."""
    parts = name.removeprefix("./").split("/")
    if name.startswith("/") or "\\" in name or ":" in parts[0]:
        return "an absolute member name"
    if ".." in parts:
        return "a member name that leads out of its folder"
    if "" in parts or "." in parts or not name.isprintable():
        return "a member name that is none"
    return None


def shown(name: str) -> str:
    """A name for people: one from elsewhere may hold a terminal's commands."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in name)
