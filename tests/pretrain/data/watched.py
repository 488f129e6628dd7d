"""Reads a folder or file in a process that is watched: what it opened, started, executed, how long it took, what it held.

`python -m tests.pretrain.data.watched` imports what readers need, then forks for each line of standard input, a JSON list of
[kind, path, tokenizer or null], and answers each with a line of JSON. The interpreter's own audit hook sees every file that is
opened, process that is started and class that is unpickled, by Python code and by the standard library's C code alike.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

FORBIDDEN = (
    *("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.system", "pty.spawn"),
    *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"),
)
SECONDS = 30  # after which a reader hangs


class Seen(NamedTuple):
    """refused: the UserError's message, or else what was skipped, with its reasons. failed: any other exception, or signal.
    values: the documents, or the ids of the shards. acts: what no reader may do. bytes: beyond the imports."""

    refused: str
    skipped: dict[str, int]
    values: list[Any]
    failed: str
    acts: list[str]
    seconds: float
    bytes: int


class Watched:
    """The process; as a context, ended at its end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def read(self, kind: str, path: Path, tokenizer: Path | None = None) -> Seen:
        """kind: "shards" (a folder of ours), "documents" (a file or folder of elsewhere), or one of ACTS."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([kind, str(path), tokenizer and str(tokenizer)]), file=self._process.stdin, flush=True)
        return Seen(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    import torch  # noqa: F401  webdataset imports it
    import webdataset.tariterators  # noqa: F401
    from pyarrow import compute, parquet  # noqa: F401

    from pretrain.data import stream  # noqa: F401
    from pretrain.data.foreign import megatron, samples  # noqa: F401
    from pretrain.data.foreign import parquet as ours  # noqa: F401
    from pretrain.tokenization.foreign import load_tokenizer

    tokenizers: dict[str, Any] = {}
    for line in sys.stdin:
        kind, path, model = json.loads(line)
        if model is not None and model not in tokenizers:
            tokenizers[model] = load_tokenizer(model)
        print(json.dumps(_forked(kind, path, tokenizers.get(model))._asdict()), flush=True)


def _forked(kind: str, path: str, tokenizer: Any) -> Seen:
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(here)
        with open(there, "w") as answer:
            json.dump(_watch(kind, path, tokenizer)._asdict(), answer)
        os._exit(0)
    os.close(there)
    with open(here) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        return Seen("", {}, [], f"signal {os.waitstatus_to_exitcode(status)}", [], 0.0, 0)
    return Seen(**json.loads(text))


def _watch(kind: str, path: str, tokenizer: Any) -> Seen:
    signal.alarm(SECONDS)
    acts: list[str] = []
    watching = [True]
    inside = os.path.realpath(path)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not watching[0]:
            return
        if event in FORBIDDEN:
            acts.append(f"{event} {args!r:.200}")
        elif event == "open" and not _may_open(args, inside):
            acts.append(f"open {args!r:.200}")

    before, begin = _peak(), time.process_time()
    skipped: dict[str, int] = {}
    values: list[Any] = []
    refused = failed = ""
    sys.addaudithook(hook)
    from pretrain.errors import UserError

    try:
        {"shards": _read_shards, "documents": _read_documents}.get(kind, _act_of(kind))(
            path, tokenizer, values, skipped
        )
    except UserError as error:
        refused = str(error)
    except BaseException as error:
        failed = f"{type(error).__name__}: {error!r:.300}"
    watching[0] = False
    return Seen(refused, skipped, values, failed, acts, time.process_time() - begin, _peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _may_open(args: tuple[Any, ...], inside: str) -> bool:
    """What was asked for, and to read only; modules that are imported late are the interpreter's and the program's own."""
    path, mode, flags = args
    if isinstance(path, int):
        return True
    if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    path = os.path.abspath(os.fsdecode(path))
    program = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[3]))
    ours = path in (inside, inside.removesuffix(".idx") + ".bin") or path.startswith(f"{inside}/")
    return ours or (path.startswith(program) and path.endswith((".py", ".pyc", ".so")))


def _read_shards(path: str, _: Any, values: list[Any], __: dict[str, int]) -> None:
    import numpy as np

    from pretrain.data.stream import Stream

    stream = Stream([path], 16, seed=1, shuffle=False)
    for number in range(stream.samples_per_epoch):
        values.append(stream.read(np.array([number]))[0].tolist())
    stream.close()


def _read_documents(path: str, tokenizer: Any, values: list[Any], skipped: dict[str, int]) -> None:
    from pretrain.data.documents import Skipped, read_documents, text_files

    for document in read_documents(text_files([path]), skipped=Skipped(counts=skipped), tokenizer=tokenizer):
        values.append([document.text[:200], None if document.tokens is None else document.tokens[:200].tolist()])


def _act_of(kind: str) -> Any:
    """What no reader may do, done, to see that it would be seen."""
    return lambda path, *_: ACTS[kind](path)


ACTS = {
    "a process": lambda path: subprocess.run(["true"], check=True),
    "a shell": lambda path: os.system("true"),  # noqa: S605
    "a pickle": lambda path: pickle.loads(b"cbuiltins\nlist\n."),
    "a file of the host": lambda path: open("/etc/passwd").close(),
    "a file beside it": lambda path: open(f"{path}-other").close(),
    "a new file": lambda path: open(f"{path}/new", "w").close(),
    "a removed file": lambda path: os.unlink(f"{path}/old"),
    "much memory": lambda path: len(b"x" * (400 << 20)),
    "another exception": lambda path: [][0],
}


if __name__ == "__main__":
    _serve()
