"""Documents to token ids with several processes, in order and with bounded memory.

Documents travel in batches of about a mebibyte of text; at most two batches a process are on their way, so the reader
never runs ahead of the workers. What comes out does not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.documents import Document
from pretrain.data.shards import dtype_of
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import open_tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024

_worker: list[Tokenizer] = []  # of a worker process: set once, when it starts


class Encoded(NamedTuple):
    """A batch's documents: all ids one after the other, each document ended by eos."""

    tokens: np.ndarray[Any, Any]
    lengths: list[int]  # tokens of each document, its end included
    altered: list[str]  # names of documents that do not decode to themselves


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Encoded:
    """Encode a batch, and decode it again to see whether the text comes back; documents that came as tokens keep these."""
    texts = [document for document in documents if document.tokens is None]
    rows = [tokenizer.encode_array(document.text) for document in texts]
    again = tokenizer.decode_many(rows)
    altered = [document.name for document, text in zip(texts, again, strict=True) if text != document.text]
    dtype, found = dtype_of(tokenizer.vocab_size), iter(rows)
    parts, lengths, end = [], [], np.array([tokenizer.eos], dtype_of(tokenizer.vocab_size))
    for document in documents:
        ids = np.asarray(next(found) if document.tokens is None else document.tokens, dtype)
        parts += [ids, end]
        lengths.append(len(ids) + 1)
    return Encoded(np.concatenate(parts) if parts else np.empty(0, dtype), lengths, altered)


class Encoder:
    """Encodes batches in `processes` processes (1: in this one). The processes start at once, so make it before any
    thread: a fork copies the locks that other threads hold."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self.tokenizer, self.processes = tokenizer, processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(
                processes, context, _start, (tokenizer.file, tokenizer.content, os.getpid())
            )
            self._pool.submit(os.getpid).result()

    def __call__(self, documents: Iterable[Document]) -> Iterator[tuple[list[Document], Encoded]]:
        """Each batch of documents with its ids, in order."""
        if self._pool is None:
            for batch in batches(documents):
                yield batch, encode(self.tokenizer, batch)
            return
        waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
        try:
            for batch in batches(documents):
                waiting.append((batch, self._pool.submit(_encode_here, batch)))
                if len(waiting) > 2 * self.processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A tokenizing process was killed, most likely for want of memory: use fewer --processes."
            ) from error

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents by the mebibyte of text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(file: str, content: bytes, parent: int) -> None:
    """A worker's start: its tokenizer, and a watch that ends it when the main process was killed. Ctrl-C is the main
    process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.append(open_tokenizer(file, content))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_here(documents: list[Document]) -> Encoded:
    return encode(_worker[0], documents)
