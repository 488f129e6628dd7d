"""A folder that appears whole or not at all: written beside its place under a hidden name, then renamed.

A run that was killed leaves the hidden folder behind. The next one recognises it as nobody's (its lock is free): it removes
it, says so and starts again (`whole_folder`), or it goes on with it (`lasting_folder`). One that is still being written is
left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pretrain.config.folder import draft_of
from pretrain.errors import UserError

LOCK = ".preparing"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def whole_folder(out: str | Path, contents: Sequence[str], say: Callable[[str], None]) -> Iterator[Path]:
    """Gives a new folder to write into; on leaving without an exception it becomes `out`, else it is removed.

    contents: the names that may be written at its top, by which a killed run's leftover is known to be ours.

    Raises UserError where `out` exists and is not an empty folder, another process is writing it, or it cannot be
    written.
    """
    out = Path(os.path.realpath(out))
    draft = draft_of(out)
    lock = None
    try:
        _check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftover(draft, out, contents, say)
        draft.mkdir()
        lock = _lock(draft, out)
        yield draft
        _sync_tree(draft)
        publish(draft, out)
    except BaseException as error:
        if lock is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise _explained(error, out) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def lasting_folder(
    out: str | Path,
    contents: Sequence[str],
    begun: str,
    say: Callable[[str], None],
    new: bool = True,
    shared: bool = False,
) -> Iterator[Path]:
    """Gives the draft of `out`, new or as an earlier run left it, and leaves it there: `publish` makes it `out`.

    begun: what lies in a draft that can go on; one without it is removed as a leftover. new: whether one may be made. shared:
    others may work on it at the same time, whose files are never in the way of each other. Raises UserError as
    `whole_folder` does, where another process has it, and for a full disk.
    """
    out = Path(os.path.realpath(out))
    draft = draft_of(out)
    lock = None
    try:
        _check_free(out)
        if not new and not (draft / begun).exists():
            raise UserError(f"There is no plan for {out}: make it with `pretrain prepare TEXT... --out {out} --plan`.")
        out.parent.mkdir(parents=True, exist_ok=True)
        if not (draft / begun).exists():
            _clear_leftover(draft, out, contents, say)
            draft.mkdir(exist_ok=True)
        lock = _lock(draft, out, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield draft
    except OSError as error:
        raise _explained(error, out, "what was written before is kept, and the same command goes on") from error
    finally:
        if lock is not None:
            os.close(lock)


def publish(draft: Path, out: Path) -> None:
    """Let a draft, all of whose files are on the disk, become `out`."""
    os.rename(draft, out)
    (out / LOCK).unlink()  # last, for a draft without a held lock is a leftover to whoever starts now
    _sync(out)
    _sync(out.parent)


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name another, or remove it first.")


def _explained(error: OSError, out: Path, kept: str = "nothing was written") -> Exception:
    """The user's mistake behind the error, or the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"The disk that holds {out} is full: {kept}. Free some space.")
    if error.errno in UNWRITABLE:
        return UserError(f"{out} cannot be written: {error.strerror} ({error.filename}).")
    return error


def _lock(draft: Path, out: Path, kind: int = fcntl.LOCK_EX) -> int:
    lock = os.open(draft / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(draft / LOCK)):
            raise FileNotFoundError  # who held it was done with the draft before it was ours
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(lock)
        raise UserError(f"Another process is preparing {out} right now.") from error
    return lock


def _clear_leftover(draft: Path, out: Path, contents: Sequence[str], say: Callable[[str], None]) -> None:
    """Remove what an interrupted run left, and only that: a folder of this name that holds our names alone."""
    if not os.path.lexists(draft):
        return
    if draft.is_symlink() or not draft.is_dir() or not set(os.listdir(draft)) <= {LOCK, *contents}:
        raise UserError(f"{draft} is in the way and not a leftover of this program: move it, then start again.")
    if (draft / LOCK).is_file():
        os.close(_lock(draft, out))
    say(f"An earlier run that was to write {out} was interrupted; its leftover is removed and the work starts again.")
    shutil.rmtree(draft)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))
