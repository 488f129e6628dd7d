"""A tar from elsewhere as a tar that can be trusted: `CleanTar` reads the one and is the other.

Every header is parsed and checked here (`headers.py`) and every member read whole before it is handed on, under a header that
is written anew. So what reads the clean tar (webdataset's own expander, and Python's tarfile below it) meets plain files of
the wanted kinds only, of safe names, bounded sizes, whole samples, an end; never a link, a sparse file, a compressed stream or
a declared terabyte. A member that is not handed on is skipped with its reason; behind a place that cannot be trusted the file
ends, and that is a reason too.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator
from pathlib import Path

from pretrain.data import compressed
from pretrain.data.documents import Skipped
from pretrain.data.foreign.headers import (
    BLOCK,
    MAX_EXTENSION,
    SPECIAL,
    Damaged,
    Member,
    is_harmless,
    parse,
    problem_of,
    shown,
)
from pretrain.data.shards import USER
from pretrain.errors import UserError

MAX_SAMPLE_BYTES = 64 << 20  # of the members of one name together
MAX_SAMPLE_MEMBERS = 1024
MAX_EMPTY = 1 << 14  # members without a byte, one after the other: more are made to keep a reader busy
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200  # text is seldom packed to a twentieth
PIECE = 1 << 20
PREFIX = "./"  # before every name, so that no name is taken for the first bytes of a compressed file
ZEROS, END = bytes(BLOCK), bytes(tarfile.RECORDSIZE)
NEVER_DECODED = {"pyd", "pkl", "pickle", "pth", "pt", "cbor", "cls", "joblib", "dill", "npz", "ckpt"}


class CleanTar:
    """A binary stream (`read` alone) of the members of `path` whose last suffix is in `wanted`. What goes wrong while it is
    read ends the stream and is raised by `check`, since libraries between rewrite exceptions."""

    def __init__(self, path: Path, name: str, wanted: frozenset[str], skipped: Skipped) -> None:
        self._source = _Source(path)
        self._name, self._wanted, self._skipped = name, wanted, skipped
        self._parts = self._clean()
        self._waiting = memoryview(b"")
        self._failure: BaseException | None = None
        self._empty = 0
        self._key, self._seen, self._room = "", set[str](), 0  # of the sample at hand

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self._waiting and (part := self._next_part()) is not None:
            self._waiting = memoryview(part)
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return bytes(data)

    def _next_part(self) -> bytes | None:
        try:
            return next(self._parts, None)
        except Exception as error:  # `check` raises it; it comes between members, so the tar can end here
            self._failure = error
            return END

    def check(self) -> None:
        """Raises what ended the stream before its time: UserError when strict, or OSError."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._parts.close()
        self._source.close()

    def _clean(self) -> Generator[bytes]:
        try:
            yield from self._members()
        except Damaged as error:
            self._skipped.add(self._name, str(error))
        except compressed.DAMAGED:
            self._skipped.add(self._name, "damaged compression")
        yield END

    def _members(self) -> Generator[bytes]:
        refused: str | None = None  # why the next plain member is, by what stood before it
        while (header := self._source.read(BLOCK)) != ZEROS:
            if len(header) < BLOCK:
                raise Damaged("a tar cut short: it has no end" if not header else "a tar cut short in a header")
            member = parse(header)
            if member.kind in b"xgLK":
                refused = self._extension(member) or refused
            elif member.kind == b"0":
                yield from self._plain(member, refused)
                refused = None
            else:
                self._other(member)
                refused = None
        self._source.check_end()

    def _extension(self, member: Member) -> str | None:
        """What says more of the next member: the reason to refuse that one, if it is more than times and owners."""
        if member.size > MAX_EXTENSION:
            raise Damaged("a tar header that is extended by more than 64 KiB")
        data = self._source.member(member.size)
        if member.kind in b"LK":
            return "a member of a GNU long name"
        if is_harmless(data):
            return None
        if member.kind == b"g":
            raise Damaged("a pax header that renames or resizes all members")
        return "a member that a pax header renames or resizes"

    def _other(self, member: Member) -> None:
        """A folder, which says nothing, or what a data set has no use for."""
        if member.kind == b"S":
            raise Damaged("a sparse file in a tar")
        if member.kind in b"123456" and member.size:
            raise Damaged("a link, device or folder that declares data")
        if member.kind != b"5":
            self._skip(member, SPECIAL.get(member.kind, "a member of an unknown kind"))

    def _plain(self, member: Member, refused: str | None) -> Generator[bytes]:
        self._source.check(member.size)
        if member.size:
            self._empty = 0
        elif (count := self._empty + 1) > MAX_EMPTY:
            raise Damaged(f"more than {MAX_EMPTY:,} empty members one after the other")
        else:
            self._empty = count
        reason = refused or problem_of(member.name) or self._problem(member)
        if reason is not None:
            return self._skip(member, reason)
        header = _header(member)
        if header is None:
            return self._skip(member, "a member name that is too long")
        data = self._source.member(member.size)
        if (reason := _executable(data, member.mode)) is not None:
            self._skipped.add(f"{self._name}:{shown(member.name)}", reason)
        else:
            yield header
            yield data
            yield bytes(-member.size % BLOCK)

    def _problem(self, member: Member) -> str | None:
        """Why a plain member of a safe name is not handed on."""
        key, suffix = split_name(member.name)
        last = suffix.rpartition(".")[2]
        if last in NEVER_DECODED:
            return "a member that only a program could decode (pickle, torch, CBOR): never opened"
        if not key or last not in self._wanted:
            return "a member that is neither text nor tokens"
        if not member.size:
            return "an empty member"
        if last == "tok" and member.user == USER:
            raise UserError(f"{self._name} is a shard that prepare wrote: name its folder as data.train as it is.")
        if key != self._key:
            self._key, self._seen, self._room = key, set(), MAX_SAMPLE_BYTES
        if suffix in self._seen:
            return "a second member of one name"
        if member.size > self._room or len(self._seen) == MAX_SAMPLE_MEMBERS:
            return f"more than {MAX_SAMPLE_BYTES >> 20} MiB, or {MAX_SAMPLE_MEMBERS:,} members, of one sample"
        self._seen.add(suffix)
        self._room -= member.size
        return None

    def _skip(self, member: Member, reason: str) -> None:
        self._skipped.add(f"{self._name}:{shown(member.name)}", reason)
        self._source.pass_over(member.size)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffixes in lower case) of a member's name as webdataset splits it: at the first dot behind the last slash.
    ("", "") where it finds no sample in it."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return (f"{folder}{slash}{key}", suffix.lower()) if key and dot else ("", "")


def _header(member: Member) -> bytes | None:
    """The header under which a member is handed on; None: tar's plain form has no place for the name."""
    clean = tarfile.TarInfo(PREFIX + member.name.removeprefix(PREFIX))
    clean.size = member.size
    try:
        return clean.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError:
        return None


def _executable(data: bytes, mode: int) -> str | None:
    is_program = data.startswith(b"\x7fELF") or (data.startswith(b"MZ") and b"\0" in data[:64])
    is_script = data.startswith(b"#!") and mode & 0o111
    return "an executable" if is_program or is_script else None


class _Source:
    """The bytes of a tar file, whatever its compression, with what can be known before they are read."""

    def __init__(self, path: Path) -> None:
        self._packed = path.suffix.lower() != ".tar"
        self._file = compressed.open_bytes(path)
        self._size, self._place = path.stat().st_size, 0

    def close(self) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """`size` bytes, or what is left."""
        data = self._file.read(size)
        self._advance(len(data))
        return data

    def member(self, size: int) -> bytes:
        """A member's bytes, without what fills its last block. Raises Damaged where the file ends before."""
        self.check(size)
        data = self.read(size)
        if len(data) < size or len(self.read(-size % BLOCK)) < -size % BLOCK:
            raise Damaged("a tar cut short inside a member")
        return data

    def pass_over(self, size: int) -> None:
        """Go behind a member's bytes, without keeping any."""
        self.check(size)
        left = size + -size % BLOCK
        if not self._packed:
            self._advance(left)
            self._file.seek(self._place)
        while self._packed and left:
            count = len(self.read(min(left, PIECE)))
            if not count:
                raise Damaged("a tar cut short inside a member")
            left -= count

    def check_end(self) -> None:
        """Behind the block of zeros that ends the members there must be nothing but zeros. Raises Damaged."""
        rest = self.read(PIECE)
        if rest.strip(b"\0"):
            raise Damaged("a tar with more behind its end")

    def check(self, size: int) -> None:
        """Raises Damaged where a plain file does not have that many bytes more."""
        if not self._packed and size > self._size - self._place:
            raise Damaged("a member that declares more bytes than the file has")

    def _advance(self, count: int) -> None:
        self._place += count
        if self._packed and self._place > BOMB_BYTES and self._place > BOMB_RATIO * self._size:
            raise Damaged(f"a compressed tar of more than {BOMB_RATIO} times its size")
