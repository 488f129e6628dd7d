"""The node's cache: whole files in one folder, never more bytes than its bound, shared by processes that know nothing of
each other but its locks.

    DIR/.bytes                     how many bytes the files have, in digits; its lock is held while that or a file's size changes
    DIR/<64 digits>/NAME           a file of the source with that fingerprint, as it is at the source
    DIR/<64 digits>/.NAME.partial  one that is being fetched: its lock is held by who fetches it

Locks are flock's, which the kernel frees when a process dies, however it dies. What it leaves is a partial file without a
holder: the next to fetch that file writes over it, and whoever next makes room removes it. `.bytes` is never less than what
the files have: it is raised before a file grows and lowered after one is gone, and counted anew whenever room is made.

Nothing here knows what is in a file; who reads one checks it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import UserError

COUNT = ".bytes"
SOURCE = re.compile(r"[0-9a-f]{64}")
PARTIAL = ".partial"
POLL_SECONDS = 0.02
ROOM_SECONDS = 10.0
FRESH_SECONDS = 60.0  # a file's time of last use is not written more often
FULL = (errno.ENOSPC, errno.EDQUOT)
Key = tuple[str, str]  # fingerprint of the source, name of the file


class _File(NamedTuple):
    used: int  # nanoseconds since 1970
    path: str
    size: int


class Cache:
    """Files below `folder`, of at most `size` bytes together. Safe for several threads and processes at once.

    Raises UserError where the folder cannot be made or others could write into it.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            os.close(os.open(folder / COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise UserError(
                f"data.cache.dir: {folder} cannot be used: {error.strerror}. Name a folder of your own on a local disk."
            ) from error
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(
                f"data.cache.dir: {folder} can be written by others, who could change what is trained on; name a folder "
                "of your own, or take their right away (chmod go-w)."
            )

    def read(self, key: Key, start: int, size: int) -> bytes | None:
        """`size` bytes of a file from `start` on, fewer where it ends before; None where it is not there."""
        try:
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            data = os.pread(file, size, start)
            _touch(file, os.fstat(file))
        except OSError:
            return None
        finally:
            os.close(file)
        return data

    def holds(self, key: Key) -> bool:
        """Whether the file is there; that it was asked for counts as a use."""
        path = self._path(key)
        try:
            found = os.stat(path, follow_symlinks=False)
            _touch(path, found)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode)

    def remove(self, key: Key) -> None:
        """Away with a file that is not what it should be."""
        with self._counted() as count, suppress(OSError):
            path = self._path(key)
            size = path.lstat().st_size
            path.unlink()
            count.total -= size

    def fill(self, key: Key, fetch: Callable[[], bytes], seconds: float) -> bytes | None:
        """Put what `fetch` gives into the file, unless it is there or another process does so: then wait for that.

        Returns what was fetched, None where another did. One that holds the lock for longer than `seconds`, stopped or
        hung, is not waited for: then the bytes are fetched for the caller alone. Raises what `fetch` raises, and UserError
        where the folder cannot be written.
        """
        try:
            return self._fill(key, fetch, time.monotonic() + seconds)
        except OSError as error:
            raise UserError(
                f"data.cache.dir: {self.folder} cannot be written: {error.strerror}. Free some space there, or name a "
                "folder on another disk."
            ) from error

    def _fill(self, key: Key, fetch: Callable[[], bytes], deadline: float) -> bytes | None:
        while not self.holds(key):
            with self._partial(key) as file:
                if file is not None:
                    if self.holds(key):
                        return None
                    data = fetch()
                    self._put(key, file, data)
                    return data
            if time.monotonic() > deadline:
                return fetch()
            time.sleep(POLL_SECONDS)
        return None

    # -- one file ----------------------------------------------------------------------------------------------------

    def _path(self, key: Key) -> Path:
        return self.folder / key[0] / key[1]

    def _partial_path(self, key: Key) -> Path:
        return self.folder / key[0] / f".{key[1]}{PARTIAL}"

    @contextmanager
    def _partial(self, key: Key) -> Iterator[int | None]:
        """The partial file, locked and empty; None where another holds it. It is gone afterwards."""
        path, flags = self._partial_path(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            file = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            file = os.open(path, flags, 0o600)
        try:
            if not _lock_now(file) or not _is(path, file):
                yield None
                return
            try:
                self._resize(file, 0)  # of one that was killed
                yield file
            finally:
                if _is(path, file):  # not renamed: nothing came of it
                    self._resize(file, 0)
                    path.unlink()
        finally:
            os.close(file)

    def _put(self, key: Key, file: int, data: bytes) -> None:
        """Write, sync, rename. A disk that fills up before the bound is reached costs the files that were used least."""
        try:
            self._write(file, data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._resize(file, 0)
            self._write(file, data, spare=4 * len(data))
        with self._counted():  # who counts the files meanwhile would find it under neither name
            os.rename(self._partial_path(key), self._path(key))

    def _write(self, file: int, data: bytes, spare: int = 0) -> None:
        deadline = time.monotonic() + ROOM_SECONDS
        while not self._resize(file, len(data), spare):
            if time.monotonic() > deadline:
                raise UserError(
                    f"data.cache.size: {self.size:,} bytes have no room for a file of {len(data):,} bytes beside those that "
                    "are being written; raise it."
                )
            time.sleep(POLL_SECONDS)
        rest, place = memoryview(data), 0
        while place < len(rest):
            place += os.pwrite(file, rest[place:], place)
        os.fsync(file)

    def _resize(self, file: int, size: int, spare: int = 0) -> bool:
        """Give a partial file this size, for which room is made first; False where others that write leave none now.
        spare: bytes that must go in any case."""
        if (now := os.fstat(file).st_size) == size:  # nobody else changes it: it is locked
            return True
        with self._counted() as count:
            if size > now:
                self._make_room(count, size - now, spare)
                if count.total + size - now > self.size:
                    return False
                count.total += size - now
                count.write()
            os.ftruncate(file, size)
            count.total -= max(now - size, 0)
        return True

    # -- all files ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """The count, while no other changes it or a file's size."""
        file = os.open(self.folder / COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            count = _Count(file)
            if count.total < 0:
                count.total = sum(found.size for found in self._files())
            yield count
            count.write()
        finally:
            os.close(file)

    def _make_room(self, count: _Count, size: int, spare: int) -> None:
        """Remove the least recently used files until `size` more bytes fit, and a little more, so that it is not done each
        time; as far as there are any that nobody writes."""
        if count.total + size <= self.size and not spare:
            return
        self._remove_leftovers()
        files = sorted(self._files())
        count.total = sum(found.size for found in files)
        aim = min(self.size - size, count.total - spare)
        if count.total > aim:
            aim -= self.size // 32
        for found in files:
            if count.total <= aim:
                break
            if not found.path.endswith(PARTIAL):
                with suppress(FileNotFoundError):
                    os.unlink(found.path)
                count.total -= found.size

    def _files(self) -> Iterator[_File]:
        for source in os.scandir(self.folder):
            if SOURCE.fullmatch(source.name) and source.is_dir(follow_symlinks=False):
                for entry in os.scandir(source.path):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield _File(found.st_mtime_ns, entry.path, found.st_size)

    def _remove_leftovers(self) -> None:
        """Partial files whose holder died."""
        for found in list(self._files()):
            if found.path.endswith(PARTIAL):
                with suppress(OSError):
                    file = os.open(found.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                    try:
                        if _lock_now(file) and _is(Path(found.path), file):
                            os.unlink(found.path)
                    finally:
                        os.close(file)


class _Count:
    """The number in the file COUNT; below 0 where there is none that can be read."""

    def __init__(self, file: int) -> None:
        self.file = file
        digits = os.pread(file, 32, 0)
        self.total = int(digits) if re.fullmatch(rb"\d{20}", digits) else -1

    def write(self) -> None:
        with suppress(OSError):  # a full disk: the digits that stood there are written over and need no room
            os.pwrite(self.file, f"{max(self.total, 0):020d}".encode(), 0)


def _lock_now(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, file: int) -> bool:
    """Whether the path still leads to the open file: another may have renamed or removed it before it was locked."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _touch(file: int | Path, found: os.stat_result) -> None:
    """Note the use of a file, in its time of modification."""
    if time.time() - found.st_mtime > FRESH_SECONDS:
        os.utime(file)
