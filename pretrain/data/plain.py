"""Open a file of a folder from elsewhere: a plain file, not what a link leads to and not a pipe that would never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO


def open_plain(path: Path) -> IO[bytes]:
    """A binary stream of the file. Raises OSError, also where it is no plain file."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a plain file", os.fspath(path))
    return open(file, "rb")
