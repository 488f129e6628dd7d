"""A process that does jobs: `python -m pretrain.data.preparing.worker WORK`, started by `pool.py`.

It reads a job a line and answers a line of JSON for each sign of life and for each end. It ends with its standard input, so
that no process outlives the one that started it.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from pretrain.data.preparing.tools import Job, Tools
from pretrain.data.preparing.work import do
from pretrain.errors import UserError

SECONDS_A_BEAT = 0.2


def main(work: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    tools = Tools(Path(work))
    for job in iter(_jobs().get, None):
        answers.write(json.dumps(_answer(tools, job, answers)) + "\n")


def _jobs() -> queue.Queue[Job]:
    """What is asked on standard input. Its end ends the process at once, whatever it does."""
    jobs: queue.Queue[Job] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            stage, number = json.loads(line)
            jobs.put(Job(stage, number))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return jobs


def _answer(tools: Tools, job: Job, answers: Any) -> dict[str, Any]:
    done, told = [0, 0], time.monotonic()

    def beat(size: int, tokens: int) -> None:
        nonlocal told
        done[0] += size
        done[1] += tokens
        if time.monotonic() - told >= SECONDS_A_BEAT:
            answers.write(json.dumps({"beat": done}) + "\n")
            done[:], told = [0, 0], time.monotonic()

    try:
        do(tools, job, beat)
    except UserError as error:
        return {"mistake": str(error)}
    except OSError as error:
        return {"errno": error.errno or errno.EIO, "text": error.strerror or str(error), "file": error.filename}
    except Exception:
        return {"fault": traceback.format_exc()}
    return {"beat": done, "done": True}


if __name__ == "__main__":
    main(sys.argv[1])
