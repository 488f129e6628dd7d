"""Which addresses data may have. Everything else that looks like one is refused by its own reason, before anything is
opened: commands, other protocols, chains of them, local files by URL, passwords.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from pretrain.errors import UserError

REMOTE = ("http", "https", "s3", "gs", "memory")  # memory: fsspec's own, within one process
ALIASES = {"gcs": "gs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_PATH = re.compile(r"[^\s?#\\\x00-\x1f\x7f]*")
KINDS = "local folders and from http://, https://, s3:// and gs:// addresses"


@dataclass(frozen=True)
class Address:
    """A file or folder elsewhere. host: of s3 and gs the bucket, with a port where one was given; path: without the
    slash before it."""

    scheme: str
    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> Address:
        return Address(self.scheme, self.host, f"{self.path}/{name}".lstrip("/"))


def parse_address(text: str) -> Address | None:
    """The address that the text is; None for a local path. Raises UserError for one that is not read.

    A slash too few behind the scheme is forgiven: that is what pathlib leaves of an address.
    """
    found = _SCHEME.fullmatch(text)
    if found is None:
        return None
    scheme = ALIASES.get(found[1].lower(), found[1].lower())
    if "::" in re.sub(r"\[[^\]]*\]", "", text):  # not within an IPv6 address
        raise UserError(f"{_shown(text)}: chains of addresses (::) are not read; name the folder of shards itself.")
    if scheme == "file":
        raise UserError(f"{_shown(text)}: a local folder is named by its plain path, without file:.")
    if scheme not in REMOTE:
        raise UserError(f"{_shown(text)}: data are read from {KINDS}, never by {scheme}: or from commands.")
    if not found[2].startswith("/"):
        raise UserError(f"{_shown(text)}: is no whole address; write {scheme}://HOST/FOLDER.")
    host, _, path = found[2].lstrip("/").partition("/")
    if "@" in host:
        raise UserError(
            f"{_shown(text)}: holds a user's name or password, which would stand in logs and checkpoints; leave it out "
            "(credentials of s3 and gs are read from their own tools' files and variables)."
        )
    if not _is_host(host, scheme in ("http", "https")) or not _PATH.fullmatch(path) or ".." in path.split("/"):
        raise UserError(
            f"{_shown(text)}: is no plain address of a folder; write {scheme}://HOST/FOLDER, without '?', '#', '..' or spaces."
        )
    return Address(scheme, host, path.strip("/"))


def _is_host(host: str, connects: bool) -> bool:
    """A name, or an address of digits as it is usually written: 127.1 or 0x7f000001 only hide one. connects: it is a
    server's, not a bucket's."""
    found = _HOST.fullmatch(host)
    if found is None or not connects:
        return found is not None
    name = found[1].strip("[]")
    if found[1] == name and not re.fullmatch(r"\d+|0x[0-9a-f]*", name.rstrip(".").rpartition(".")[2], re.IGNORECASE):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """For a message: without what may be a password, and printable."""
    return ascii(re.sub(r"//?[^/@]*@", "//***@", text))[1:-1]
