"""`python -m pretrain tensorboard`: TensorBoard on runs or sweeps, on this machine alone unless told otherwise.

TensorBoard looks into one folder, so it is given one of links to each run's files under the run's name. (Its --logdir_spec
cannot have a comma or a colon in a name, and turns its fast reader off.) Imports no torch.
"""

from __future__ import annotations

import errno
import getpass
import socket
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.charts import FOLDER
from pretrain.errors import UserError

if TYPE_CHECKING:
    from tensorboard.program import TensorBoard

PORT = 6006  # the first that is tried
Place = tuple[str, ...]  # a path's parts
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def main(args: Namespace) -> int:
    """`python -m pretrain tensorboard`, until it is interrupted."""
    boards = boards_of(args.runs)
    port = _free_port(args.host) if args.port is None else _checked_port(args.host, args.port)
    with linked(boards) as folder:
        print(*_greeting(args.runs, args.host, port), sep="\n", flush=True)
        return int(serving(folder, "--host", args.host, "--port", str(port)).main())


def boards_of(paths: Sequence[str]) -> dict[str, Path]:
    """TensorBoard's folders of runs or sweeps, each by a name of its own: as much of its path's end as tells it from the
    others. Raises UserError for a folder that has none."""
    missing = [path for path in paths if not (Path(path) / FOLDER).is_dir()]
    if missing:
        raise UserError(
            f"no TensorBoard files in {', '.join(missing)}: these are no runs' folders, or monitor.tensorboard is off"
        )
    boards = {_place(folder): folder / FOLDER for folder in (Path(path).resolve() for path in paths)}
    names: dict[str, Path] = {}
    for place, board in boards.items():
        name = _name(place, [*boards])
        names[name if name not in names else f"{name} ({len(names)})"] = board
    return names


def _place(folder: Path) -> Place:
    """A sweep's trial goes by both their names."""
    *parents, name = folder.parts
    if name == "run" and parents[-2:-1] == ["trials"]:
        return (*parents[:-3], f"{parents[-3]}-{parents[-1]}")
    return folder.parts


def _name(place: Place, others: Sequence[Place]) -> str:
    ends = (place[-length:] for length in range(1, len(place) + 1))
    unique = (end for end in ends if sum(other[-len(end) :] == end for other in others) == 1)
    return "-".join(next(unique, place)).replace("/", "")


@contextmanager
def linked(boards: dict[str, Path]) -> Iterator[Path]:
    """A folder of links to these, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as name:
        for board, target in boards.items():
            Path(name, board).symlink_to(target)
        yield Path(name)


def _greeting(runs: Sequence[str], host: str, port: int) -> Iterator[str]:
    here = "localhost" if host in LOOPBACK else host
    yield f"TensorBoard of {', '.join(runs)}: http://{here}:{port}/#custom_scalars (Ctrl-C ends it)"
    if host in LOOPBACK:
        yield f"from another machine: ssh -N -L {port}:localhost:{port} {_user()}@{socket.gethostname()}, there the same address"
    else:
        yield f"warning: whoever reaches this machine at {host} can read these runs"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "USER"


def _checked_port(host: str, port: int) -> int:
    """Raises UserError where it cannot be listened at."""
    if not 0 < port < 2**16:
        raise UserError(f"--port {port}: a port is 1 to {2**16 - 1}")
    if not _is_free(host, port):
        raise UserError(f"--port {port}: is in use; name another, or leave it out to have a free one chosen")
    return port


def _free_port(host: str) -> int:
    """The first that is free from PORT on. Raises UserError."""
    for port in range(PORT, PORT + 100):
        if _is_free(host, port):
            return port
    raise UserError(f"no port from {PORT} to {PORT + 99} is free; name one by --port")


def _is_free(host: str, port: int) -> bool:
    """Raises UserError where the host is none of this machine's names."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
            server.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise UserError(f"--host {host}: cannot be listened at: {error}") from None
    return True


def serving(folder: Path, *options: str) -> TensorBoard:
    """TensorBoard on a folder, not yet started; options: its own."""
    from tensorboard.program import TensorBoard

    program = TensorBoard()
    program.configure(["", "--logdir", str(folder), *options])
    return program
