"""What a process needs to work on pieces: the plan, the tokenizer, and what a plan adds to these, each opened once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pretrain.data.packing import Packer, packer_of, sentence_ends
from pretrain.data.preparing.files import read_json, write_json, write_whole
from pretrain.data.preparing.options import Options
from pretrain.data.preparing.plan import MEND, Changed, Plan
from pretrain.data.shards import dtype_of
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES, open_tokenizer

if TYPE_CHECKING:  # imported where there is one
    from pretrain.data.selection.select import Selection
    from pretrain.data.selection.tally import Tally

SIGN, SAMPLE, ENCODE = "sign", "sample", "encode"
TOKENIZER = "tokenizer.json.sha256"  # stands for a tokenizer that is whole, and says which file it is

Beat = Callable[[int, int], None]  # (bytes of text, tokens) that were done since the last call: a sign of life


class Job(NamedTuple):
    """A piece in a stage, or a shard of a part."""

    stage: str
    number: int


@dataclass
class Tools:
    """Of one process. `work` lies in the folder that becomes OUT."""

    work: Path

    @cached_property
    def plan(self) -> Plan:
        plan = Plan.open(self.work)
        assert plan is not None, "there is work without a plan"
        return plan

    @cached_property
    def options(self) -> Options:
        known = {one.name for one in fields(Options)} - {
            "tokenizer",
            "select",
        }  # these two the plan has by their content
        values = {name: value for name, value in self.plan.options.items() if name in known}
        return Options(**{**values, "user_symbols": tuple(values["user_symbols"])})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = read_json(self.work / TOKENIZER)["file"]
        assert file in FILES
        return open_tokenizer(file, (self.work / file).read_bytes())

    @property
    def known_tokenizer(self) -> Tokenizer | None:
        """None before it is trained."""
        return self.tokenizer if has_tokenizer(self.work) else None

    @cached_property
    def selection(self) -> Selection | None:
        """The plan's; raises Changed if its file, or one that it names, is another by now."""
        if self.plan.selection is None:
            return None
        from pretrain.data.selection.select import Selection

        found = Selection.load(self.plan.selection)
        if found.fingerprint != self.plan.options["select"]:
            raise Changed(f"{self.plan.selection}, or a file that it names, has changed since the work began. {MEND}")
        return found

    def new_tally(self) -> Tally | None:
        """Counts what the selection does, where there is one."""
        if self.selection is None:
            return None
        from pretrain.data.selection.tally import Tally

        return Tally()

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.tokenizer.vocab_size)

    @cached_property
    def _sentence_ends(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return sentence_ends(self.tokenizer)

    def packer(self) -> Packer:
        """A new one, for a piece and part."""
        packing = self.options.rows
        ends = self._sentence_ends if packing.kind == "sentences" else None
        return packer_of(packing, self.dtype, self.tokenizer.eos, ends)

    def result_path(self, job: Job) -> Path:
        return self.work / job.stage / f"{job.number:06d}.json"

    def is_done(self, job: Job) -> bool:
        """A result is written last, so that it stands for all that its job wrote."""
        return self.result_path(job).exists()

    def result(self, job: Job) -> Any:
        """What a job that is done told; None of one that is not."""
        return read_json(self.result_path(job))

    def finish(self, job: Job, result: Any) -> None:
        """Tell it: the job is done."""
        write_json(self.result_path(job), result)


def has_tokenizer(work: Path) -> bool:
    return (work / TOKENIZER).exists()


def keep_tokenizer(work: Path, tokenizer: Tokenizer) -> None:
    """Put it into the work folder."""
    with write_whole(work / tokenizer.file) as file:
        file.write(tokenizer.content)
    write_json(work / TOKENIZER, {"file": tokenizer.file, "sha256": tokenizer.sha256})
