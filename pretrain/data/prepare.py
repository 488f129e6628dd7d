"""`python -m pretrain prepare`: text in, shards of tokens, manifests and a tokenizer out.

    OUT/train/ and OUT/validation/    one source each: shards, their hashes, manifest.json, the tokenizer
    OUT/report.json                   what was read, skipped and why
    OUT/selection-report.html         of a selection: what it left out and why, with examples

The texts are cut into pieces (`preparing/plan.py`). Two passes over them: one draws the tokenizer's sample (from training
documents only), one encodes each piece by itself; then each shard is cut out of the pieces' tokens by itself. A document
goes to validation by the hash of its text, so copies stay on one side and the split is stable when the corpus grows. The
bytes written depend on the text, the options and the seed; not on the number of processes or tasks, on what was killed and
started again, on the clock or the folder. Memory does not grow with the text.

All of it happens in a hidden folder beside OUT. What is done there is never done again: a start with the same command goes
on with it, and with --plan, --task and --merge so do processes on several machines.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.config.folder import LAUNCH, LOGS, PLAN
from pretrain.data import manifest as manifests
from pretrain.data.documents import Skipped, TextFile, stdlib_corpus, text_files
from pretrain.data.folder import lasting_folder, publish
from pretrain.data.packing import Packing
from pretrain.data.preparing import merge, plan, sampling, stages
from pretrain.data.preparing.files import read_json, write_whole
from pretrain.data.preparing.options import PARTS, NoDocuments, Options, Part, Report, check_split, part_of
from pretrain.data.preparing.pool import TIMEOUT
from pretrain.data.preparing.selecting import find_copies, is_clustered
from pretrain.data.preparing.stages import Stages
from pretrain.data.preparing.tools import ENCODE, SIGN, Job, Tools, has_tokenizer, keep_tokenizer
from pretrain.data.shards import Entry, ShardWriter
from pretrain.errors import UserError
from pretrain.huggingface.vocabulary import read_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import sample

if TYPE_CHECKING:
    from pretrain.data.selection.select import Selection

WORK = "work"
WRITTEN = (*PARTS, merge.REPORT, "selection-report.html")
CONTENTS = (*WRITTEN, "stdin", WORK, LAUNCH, LOGS)

Say = Callable[[str], None]


def prepare(
    texts: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    stdlib: bool = False,
    processes: int | None = None,
    say: Say | None = None,
    restart: bool = False,
    timeout: float = TIMEOUT,
) -> Report:
    """Prepare `texts` (files, folders, "-" for standard input) and, with `stdlib`, Python's own sources, into `out`.

    processes: that work (default: one a core). say: takes lines about the progress (default: standard error). restart: throw
    away what an earlier start left unfinished, in place of going on with it. timeout: seconds after which a process that
    gives no sign of life is replaced.
    Raises UserError for a user's mistake. Then, and when interrupted, `out` is as it was, and pieces that are done are kept
    beside it for the next start.
    """
    say, options = say or _tell, options or Options()
    with _working(texts, out, options, stdlib, processes, say, restart, timeout) as (tools, work):
        _compare(tools, work, say)
        _train(tools, work, say)
        work.run(ENCODE)
        return _finish(tools, out, options.strict, work)


def plan_only(
    texts: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    stdlib: bool = False,
    processes: int | None = None,
    say: Say | None = None,
    restart: bool = False,
    timeout: float = TIMEOUT,
) -> plan.Plan:
    """The first part of `prepare`, after which `do_task` may do the second. The tokenizer is trained now, unless a selection
    looks for copies: then it waits for `cluster_only`, since no copy is to be in its sample."""
    say = say or _tell
    with _working(texts, out, options or Options(), stdlib, processes, say, restart, timeout) as (tools, work):
        if not tools.plan.compares:
            _train(tools, work, say)
        return tools.plan


def rehearse(
    texts: Sequence[str | Path],
    options: Options,
    stdlib: bool = False,
    processes: int | None = None,
    count: int | None = None,
) -> Iterator[str]:
    """Lines that tell what `prepare` would do, from a sample of about `count` documents; nothing is written."""
    from pretrain.data.preparing import rehearsal

    options.check()
    processes, count = processes_of(processes), rehearsal.DOCUMENTS if count is None else count
    if count < 1:
        raise UserError(f"--sample must be at least 1, not {count}.")
    if "-" in map(str, texts):
        raise UserError("- cannot be sampled, since it is read from its beginning: keep it in a file, and name that.")
    files = [*text_files(texts), *(stdlib_corpus() if stdlib else ())]
    if not files:
        raise UserError("There is no text to look at: name files or folders, or --stdlib.")
    given = None if options.tokenizer is None else read_tokenizer(Path(options.tokenizer))
    found = rehearsal.rehearse(files, options, given, _selection(options), count)
    yield from rehearsal.lines_of(found, options, processes)


def do_task(
    out: str | Path,
    task: int,
    tasks: int,
    processes: int | None = None,
    say: Say | None = None,
    strict: bool = False,
    timeout: float = TIMEOUT,
    stage: str = ENCODE,
) -> None:
    """Encode (or sign) every `tasks`-th piece of a plan, from number `task` on. Tasks may run at once, on machines that share
    `out`'s folder, and be of different numbers of tasks: a piece that two of them do is the same from both."""
    if not 0 <= task < tasks:
        raise UserError(f"--task is a number from 0 to below --tasks, not {task} of {tasks}.")
    say = say or _tell
    with _begun(out, say, shared=True) as tools:
        if stage == SIGN and not tools.plan.compares:
            raise UserError("--stage sign: the plan compares no documents with each other; leave it out.")
        if stage == ENCODE:
            _check_ready(tools, out)
        with closing(Stages(tools, processes_of(processes), say, timeout, strict, (task, tasks))) as work:
            work.run(stage)


def cluster_only(
    out: str | Path,
    processes: int | None = None,
    say: Say | None = None,
    strict: bool = False,
    timeout: float = TIMEOUT,
) -> None:
    """What stands between the two stages of a plan whose selection looks for copies: find them, and train the tokenizer.
    Raises UserError where pieces are not signed yet."""
    say = say or _tell
    with _begun(out, say) as tools:
        if not tools.plan.compares:
            raise UserError("--cluster: the plan compares no documents with each other; leave it out.")
        _check_done(tools, SIGN, out, "signed", "their tasks (--task I --tasks N --stage sign), then --cluster again")
        with closing(Stages(tools, processes_of(processes), say, timeout, strict)) as work:
            _compare(tools, work, say)
            _train(tools, work, say)


def merge_only(
    out: str | Path,
    processes: int | None = None,
    say: Say | None = None,
    strict: bool = False,
    timeout: float = TIMEOUT,
) -> Report:
    """The last part of `prepare`. Raises UserError where pieces are missing."""
    say = say or _tell
    with _begun(out, say) as tools:
        if not (tools.work.parent / merge.REPORT).exists():
            _check_ready(tools, out)
            _check_done(tools, ENCODE, out, "encoded", "their tasks (--task I --tasks N), then --merge again")
        with closing(Stages(tools, processes_of(processes), say, timeout, strict)) as work:
            return _finish(tools, out, strict, work)


def processes_of(wished: int | None) -> int:
    """How many work: one a core unless wished otherwise. Raises UserError for less than one."""
    if wished is not None and wished < 1:
        raise UserError(f"--processes must be at least 1, not {wished}.")
    return wished or len(os.sched_getaffinity(0))


@contextmanager
def _working(
    texts: Sequence[str | Path],
    out: str | Path,
    options: Options,
    stdlib: bool,
    processes: int | None,
    say: Say,
    restart: bool,
    timeout: float,
) -> Iterator[tuple[Tools, Stages]]:
    """The draft of `out` with a plan, and who does the work; the arguments are `prepare`'s."""
    processes = processes_of(processes)
    with (
        _drafted(texts, out, options, stdlib, say, restart) as tools,
        closing(Stages(tools, processes, say, timeout, options.strict)) as work,
    ):
        yield tools, work


@contextmanager
def _drafted(
    texts: Sequence[str | Path], out: str | Path, options: Options, stdlib: bool, say: Say, restart: bool
) -> Iterator[Tools]:
    """The draft of `out` with a plan: a new one, or that of an earlier start. It is removed where a mistake ended the work
    before any piece was done, or made all of it useless."""
    options.check()
    if not texts and not stdlib:
        raise UserError("There is no text to prepare: name files or folders, - for standard input, or --stdlib.")
    with lasting_folder(out, CONTENTS, PLAN, say) as draft:
        if restart:
            for name in (*WRITTEN, WORK):
                _remove(draft / name)
        tools, begun = Tools(draft / WORK), (draft / PLAN).exists()
        try:
            _plan(tools, texts, stdlib, options, say)
            yield tools
        except BaseException as error:
            done = begun or not isinstance(error, Exception) or any(_num_done(tools, stage) for stage in (SIGN, ENCODE))
            if isinstance(error, NoDocuments) or not done or not (draft / PLAN).exists():
                shutil.rmtree(draft, ignore_errors=True)
            elif draft.exists() and not isinstance(error, plan.Changed):
                say(f"What is done is kept beside {out}: the same command goes on with it, --restart throws it away.")
            raise


def _plan(tools: Tools, texts: Sequence[str | Path], stdlib: bool, options: Options, say: Say) -> None:
    """Make the plan, or check that the one that is there is this one."""
    given = None if options.tokenizer is None else read_tokenizer(Path(options.tokenizer))
    tools.work.mkdir(exist_ok=True)
    files = [*_files(texts, tools.work), *(stdlib_corpus() if stdlib else ())]
    selection = _selection(options)
    deciding = {**options.deciding(), "tokenizer": None if given is None else given.sha256}
    deciding["select"] = None if selection is None else selection.fingerprint
    if (found := plan.Plan.open(tools.work)) is not None:
        plan.check_same(found, files, deciding)
        stages.clear(tools)
        say(f"Going on with an unfinished work: {_num_done(tools):,} of {found.pieces:,} pieces are done.")
    else:
        plan.make(tools.work, files, options, deciding, selection is not None and selection.needs_clusters)
    if given is not None and not has_tokenizer(tools.work):
        keep_tokenizer(tools.work, given)


def _selection(options: Options) -> Selection | None:
    if options.select is None:
        return None
    from pretrain.data.selection.select import Selection

    return Selection.load(options.select)


def _files(texts: Sequence[str | Path], work: Path) -> list[TextFile]:
    """The files to read; standard input is kept in a file, since it is read twice, and by other processes."""
    files: list[TextFile] = []
    if sum(str(text) == "-" for text in texts) > 1:
        raise UserError("- stands for standard input and can be named once.")
    for text in texts:
        if str(text) != "-":
            files += text_files([text])
            continue
        path, digest = work / "stdin", hashlib.sha256()
        with write_whole(path) as file:
            while block := sys.stdin.buffer.read(1 << 20):
                digest.update(block)
                file.write(block)
        plan.mark(path, digest.digest())
        files.append(TextFile(path, "standard input"))
    if texts and not files:
        raise UserError("The folders hold no text files: name the files themselves if their suffixes are unusual.")
    return files


def _train(tools: Tools, work: Stages, say: Say) -> None:
    if not has_tokenizer(tools.work):
        say("Reading the text to train a tokenizer")
        sampling.train(tools, work.run, say)


def _compare(tools: Tools, work: Stages, say: Say) -> None:
    if not is_clustered(tools):
        work.run(SIGN)
        say("Looking for copies")
        find_copies(tools)


@contextmanager
def _begun(out: str | Path, say: Say, shared: bool = False) -> Iterator[Tools]:
    """What another process planned, for this one alone or for several that do pieces of it."""
    with lasting_folder(out, CONTENTS, PLAN, say, new=False, shared=shared) as draft:
        yield Tools(draft / WORK)


def _check_ready(tools: Tools, out: str | Path) -> None:
    """Raises UserError where pieces cannot be encoded yet."""
    if not is_clustered(tools):
        raise UserError(
            f"The plan of {out} looks for copies first: run tasks with --stage sign, then --cluster, then the tasks again."
        )
    if not has_tokenizer(tools.work):
        before = "--cluster" if tools.plan.compares else "--plan"
        raise UserError(f"The plan of {out} has no tokenizer yet: let `prepare {before}` come to its end first.")


def _check_done(tools: Tools, stage: str, out: str | Path, done: str, mend: str) -> None:
    """Raises UserError where pieces are not through a stage."""
    missing = [number for number in range(tools.plan.pieces) if not tools.is_done(Job(stage, number))]
    if missing:
        raise UserError(
            f"{len(missing):,} of {tools.plan.pieces:,} pieces of {out} are not {done} yet, such as "
            f"{tools.plan.piece(missing[0]).name}: run {mend}."
        )


def _finish(tools: Tools, out: str | Path, strict: bool, work: Stages) -> Report:
    """Write the shards, and let the draft become `out`."""
    draft = tools.work.parent
    known = read_json(draft / merge.REPORT)  # of a start that was killed between its last file and its name
    report = Report.of_json(known) if known else merge.merge(tools, strict, work.run)
    stages.remove(tools)
    out = Path(os.path.realpath(out))
    publish(draft, out)
    _remove(out / WORK)
    return report


def _num_done(tools: Tools, stage: str = ENCODE) -> int:
    folder = tools.work / stage
    return sum(name.endswith(".json") and name[0] != "." for name in os.listdir(folder)) if folder.is_dir() else 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- what other ways of preparing share --------------------------------------------------------------------------------


def tokenizer_of(
    read: Callable[[Skipped], Iterable[tuple[bytes, str]]], options: Options, say: Callable[[str], None]
) -> Tokenizer:
    """The given tokenizer, or one trained on a sample of the training texts. read: gives each text behind the bytes whose
    hash tells its part, and counts what it skips."""
    if options.tokenizer is not None:
        return read_tokenizer(Path(options.tokenizer))
    say("Reading the text to train a tokenizer")

    def texts() -> Iterator[str]:
        skipped, documents = Skipped(options.strict), dict.fromkeys(PARTS, 0)
        for mark, text in read(skipped):
            name = part_of(mark, options)
            documents[name] += 1
            if name == "train":
                yield text
        check_split(documents, skipped, options)

    return sampling.train_on(sample(texts(), options.max_train_bytes, options.seed), options, say)


def end_rows(writer: ShardWriter, eos: int, part: Part, padding: int) -> None:
    """One end more, for a chunk has a look-ahead, which the last row needs as the others; and what was written counts."""
    writer.add(np.array([eos], writer.dtype))
    part.tokens, part.padding = writer.tokens, padding + 1


def finish(
    draft: Path, report: Report, tokenizer: Tokenizer, writers: dict[str, ShardWriter], packing: Packing
) -> None:
    """Write the manifests, once everything is written that they speak of."""
    for name, writer in writers.items():
        if report.parts[name].documents:
            entries = [Entry(**entry) for entry in writer.finish()]
            merge.write_manifest(draft / name, report.parts[name], tokenizer, entries, writer.tokens_per_chunk, packing)
        else:
            shutil.rmtree(draft / name)
    (draft / merge.REPORT).write_bytes(manifests.canonical(report.as_json()))
