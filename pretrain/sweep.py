"""`python -m pretrain sweep`: many runs of one config, over seeds or over any of its fields, and what they say together.

A trial is the config with some overrides, in a folder of its own; it is an ordinary run, so a sweep that was stopped goes on
where it was. With rungs the unpromising are stopped early: every trial trains up to a share of the schedule, the best go on
(one rung: Dodge et al. 2020, arXiv 2002.06305, section 5; several: successive halving, Jamieson and Talwalkar 2016).

    DIR/trials/NAME/        the runs
    DIR/result.json         every trial's seeds and score; what they say together (`pretrain.results`)
    DIR/tensorboard/        hyperparameters beside scores, expected best by budget
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain.charts import FOLDER, tag_of
from pretrain.config import yaml
from pretrain.config.load import load_config
from pretrain.data.order import key
from pretrain.errors import Exit, UserError
from pretrain.results import Metric, floor_of, of_several, write_result

WEIGHTS, ORDER = "run.seed", "data.seed"
Overrides = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Trial:
    """One run: its overrides, in the order in which they are named, and its folder."""

    overrides: Overrides
    folder: Path

    @property
    def words(self) -> list[str]:
        return [f"{path}={yaml.dump(value).removesuffix('...' + chr(10)).strip()}" for path, value in self.overrides]


@dataclass(frozen=True)
class Rung:
    """At `share` of the schedule the best `keep` trials go on."""

    share: float
    keep: int


# -- what is tried -----------------------------------------------------------------------------------------------------


def seeds(weights: int, order: int, first: int) -> list[Overrides]:
    """The grid of seeds of initial weights and of the data's order, apart from each other."""
    return [((WEIGHTS, first + w), (ORDER, first + o)) for w, o in itertools.product(range(weights), range(order))]


def searched(fields: Sequence[str], count: int | None, seed: int) -> list[Overrides]:
    """Of `path=a,b,c` every combination; or `count` random ones, where `path=low..high` (`..:log`) may stand too.

    Raises UserError for what is not understood. The draws are a function of (seed, number, path)."""
    axes = [_axis(field) for field in fields]
    if count is None:
        if continuous := [path for path, values in axes if isinstance(values, Range)]:
            raise UserError(
                f"--search {continuous[0]}: a range has no grid; give values, or --trials N to draw from it"
            )
        return list(itertools.product(*([(path, value) for value in values] for path, values in axes)))  # type: ignore[union-attr]
    return [
        tuple((path, _drawn(values, key(seed, number, *path.encode()))) for path, values in axes)
        for number in range(count)
    ]


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    log: bool


def _axis(field: str) -> tuple[str, Range | list[Any]]:
    path, equals, text = field.partition("=")
    if not equals or not path or not text:
        raise UserError(f"--search {field}: write path=a,b,c, or with --trials N path=low..high or path=low..high:log")
    if ".." not in text:
        return path, [yaml.parse(value) for value in _split(text)]
    bounds, _, kind = text.partition(":")
    try:
        low, high = (float(bound) for bound in bounds.split(".."))
    except ValueError:
        raise UserError(f"--search {field}: {bounds!r} is no range low..high of numbers") from None
    if kind not in ("", "log") or not low < high or (kind == "log" and low <= 0):
        raise UserError(f"--search {field}: a range is low..high with low below high, and for :log above 0")
    return path, Range(low, high, kind == "log")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _drawn(values: Range | list[Any], bits: Any) -> Any:
    share = (int(bits) >> 11) / 2**53
    if isinstance(values, list):
        return values[int(share * len(values))]
    if values.log:
        return float(f"{values.low * (values.high / values.low) ** share:.6g}")
    return float(f"{values.low + (values.high - values.low) * share:.6g}")


# -- running -----------------------------------------------------------------------------------------------------------


class Sweep:
    """Runs the trials one after the other. source: the config's path; common: overrides of all of them."""

    def __init__(self, source: str, common: Sequence[str], trials: Sequence[Trial], rungs: Sequence[Rung]) -> None:
        self.source, self.common, self.trials, self.rungs = source, list(common), list(trials), list(rungs)
        self.config = load_config(source, self.common)
        self.metric = Metric.of(self.config.objective.kind)

    def run(self, say: Any = print) -> list[Trial]:
        """Train to the end those that no rung stops; returns these."""
        going = self.trials
        for rung in [*self.rungs, Rung(1.0, len(self.trials))]:
            stop = [] if rung.share == 1.0 else [f"run.stop_at={rung.share:.12g} of total"]
            for number, trial in enumerate(going, start=1):
                say(f"[{number}/{len(going)}, to {rung.share:.0%}] {' '.join(trial.words)}")
                self._train(trial, stop)
            if rung.share < 1.0:
                going = sorted(going, key=lambda trial: self._rank(self.score(trial)))[: rung.keep]
        return going

    def _train(self, trial: Trial, stop: list[str]) -> None:
        trial.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pretrain", "train", self.source, *self.common, *trial.words]
        command += [f"run.dir={trial.folder / 'run'}", *stop]
        with open(trial.folder / "log.txt", "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode
        if code not in (Exit.FINISHED, Exit.DIVERGED):  # the latter is a score too
            tail = (trial.folder / "log.txt").read_text(errors="replace").splitlines()[-12:]
            raise UserError("\n".join([f"a trial ended with code {code} ({trial.folder / 'log.txt'}):", *tail]))

    def score(self, trial: Trial) -> float | None:
        """The best of its validations, as its best checkpoint has it; None where it has none that is a number."""
        best = self.metric.best(trial.folder / "run")
        return None if best is None else best[self.metric.name]

    def _rank(self, score: float | None) -> float:
        return math.inf if score is None else -self.metric.sign * score

    def floor(self) -> float | None:
        """The metric without learning, of a task."""
        told = (floor_of(trial.folder / "run").get(self.metric.name) for trial in self.trials)
        return next((floor for floor in told if floor is not None), None)

    def _seeds(self, trial: Trial) -> dict[str, Any]:
        """Both, also where the sweep is over something else."""
        given = {WEIGHTS: self.config.run.seed, ORDER: self.config.data.seed, **dict(trial.overrides)}
        return {WEIGHTS: given[WEIGHTS], ORDER: given[WEIGHTS] if given[ORDER] is None else given[ORDER]}

    # -- telling -----------------------------------------------------------------------------------------------------

    def result(self, finished: Sequence[Trial]) -> dict[str, Any]:
        scores = {trial.folder.name: self.score(trial) for trial in self.trials}
        done = [scores[trial.folder.name] for trial in finished]
        if all(score is None for score in done):
            raise UserError("no trial has a validation score: set data.validation and monitor.validate_every")
        best = min(finished, key=lambda trial: self._rank(scores[trial.folder.name]))
        return {
            "metric": self.metric.name,
            "trials": [
                {
                    "name": trial.folder.name,
                    **self._seeds(trial),
                    **dict(trial.overrides),
                    "score": scores[trial.folder.name],
                    "finished": trial in finished,
                }
                for trial in self.trials
            ],
            **of_several(self.metric, done, self.floor()),
            "best_trial": best.folder.name,
            "variance": analysis(self.trials, scores),
        }


def analysis(trials: Sequence[Trial], scores: dict[str, float | None]) -> dict[str, dict[str, float]] | None:
    """Two-way analysis of variance, without replication: whether the weights' seed and the order's matter (2002.06305,
    section 4). Of a full grid of at least 2 x 2 scores; None elsewhere. F, its degrees of freedom and p of each."""
    table: dict[tuple[Any, Any], float] = {}
    for trial in trials:
        chosen, score = dict(trial.overrides), scores[trial.folder.name]
        if score is None or not {WEIGHTS, ORDER} <= chosen.keys():
            return None
        table[chosen[WEIGHTS], chosen[ORDER]] = score
    rows, columns = sorted({row for row, _ in table}), sorted({column for _, column in table})
    if len(rows) < 2 or len(columns) < 2 or len(table) != len(rows) * len(columns):
        return None
    values = np.array([[table[row, column] for column in columns] for row in rows])
    return _two_way(values)


def _two_way(values: np.ndarray) -> dict[str, dict[str, float]]:
    rows, columns = values.shape
    mean, of_rows, of_columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    between = {
        "weights": (float(columns * ((of_rows - mean) ** 2).sum()), rows - 1),
        "order": (float(rows * ((of_columns - mean) ** 2).sum()), columns - 1),
    }
    rest = float(((values - of_rows[:, None] - of_columns[None, :] + mean) ** 2).sum())
    freedom = (rows - 1) * (columns - 1)
    found = {}
    for name, (squares, degrees) in between.items():
        f = math.inf if rest == 0 else squares / degrees / (rest / freedom)
        found[name] = {"f": f, "degrees": degrees, "rest": freedom, "p": f_tail(f, degrees, freedom)}
    return found


def f_tail(f: float, first: int, second: int) -> float:
    """P(F > f) of the F distribution: the regularised incomplete beta function I_x(second / 2, first / 2) at
    x = second / (second + first f), by its continued fraction (DLMF 8.17.22)."""
    if not math.isfinite(f):
        return 0.0
    x, a, b = second / (second + first * f), second / 2, first / 2
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta(1.0 - x, b, a)
    return _beta(x, a, b)


def _beta(x: float, a: float, b: float) -> float:
    front = math.exp(
        a * math.log(x) + b * math.log1p(-x) - math.log(a) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    )
    c, d = 1.0, 1.0 / _apart(1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, 400):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even * x, odd * x):
            d = 1.0 / _apart(1.0 + term * d)
            c = _apart(1.0 + term / c)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return front * fraction


def _apart(value: float) -> float:
    """From zero."""
    return value if abs(value) > 1e-300 else 1e-300


# -- the command -------------------------------------------------------------------------------------------------------


def rungs_of(args: Namespace, count: int) -> list[Rung]:
    """Of --keep P --at F, or of --halving: a third of the trials at each third of the way (eta 3)."""
    if args.halving:
        if args.keep is not None:
            raise UserError("--halving and --keep are two ways of stopping early: give one")
        found, keep, share = [], count, 1.0
        depth = int(math.log(max(count, 1), 3))
        for level in range(depth):
            share, keep = 3.0 ** (level - depth), max(1, math.ceil(keep / 3))
            found.append(Rung(share, keep))
        return found
    if args.keep is None:
        return []
    if not 1 <= args.keep <= count or not 0 < args.at < 1:
        raise UserError(f"--keep {args.keep} --at {args.at}: keep 1 to {count} trials, at a share between 0 and 1")
    return [Rung(args.at, args.keep)]


def overrides_of(args: Namespace) -> list[Overrides]:
    both = args.seeds_weights > 1 or args.seeds_order > 1
    over_seeds = seeds(args.seeds_weights, args.seeds_order, args.first_seed) if both or not args.search else [()]
    if min(args.seeds_weights, args.seeds_order) < 1 or (args.trials is not None and args.trials < 1):
        raise UserError("--seeds-weights, --seeds-order and --trials are at least 1")
    over_fields = searched(args.search, args.trials, args.first_seed) if args.search else [()]
    return [fields + more for fields in over_fields for more in over_seeds]


def main(args: Namespace) -> int:
    """`python -m pretrain sweep`."""
    out = Path(args.out)
    chosen = overrides_of(args)
    width = len(str(len(chosen) - 1))
    trials = [Trial(one, out / "trials" / f"{number:0{width}d}") for number, one in enumerate(chosen)]
    _check_same(out, args, trials)
    sweep = Sweep(args.config, args.overrides, trials, rungs_of(args, len(trials)))
    for trial in trials:
        load_config(args.config, [*args.overrides, *trial.words])  # every mistake before the first run
    if args.plan:
        return _plan(out, sweep)
    finished = sweep.run(lambda line: print(line, file=sys.stderr, flush=True))
    result = sweep.result(finished)
    write_result(out, result)
    _to_board(out, result)
    Console(highlight=False).print(_table(result), *_words(result), sep="\n")
    return 0


def _plan(out: Path, sweep: Sweep) -> int:
    """Leave the trials to an array of jobs (launch/arrays.py reads what `_check_same` wrote)."""
    if sweep.rungs:
        raise UserError("--plan: jobs of an array cannot wait for each other; leave out --keep and --halving")
    print(
        f"{len(sweep.trials)} trials are planned in {out}. As jobs of Slurm's, for example:\n"
        f"  python -m launch slurm {shlex.quote(str(out))} --nodes 1 --gpus-per-node 1 --time 2:00:00\n"
        "and when they have ended, for what they say together, this command without --plan"
    )
    return 0


def _check_same(out: Path, args: Namespace, trials: Sequence[Trial]) -> None:
    """A sweep goes on only as what it was."""
    told = json.dumps(
        [args.config, args.overrides, [trial.words for trial in trials], args.keep, args.at, args.halving]
    )
    kept = out / "sweep.json"
    if kept.is_file() and kept.read_text() != told:
        raise UserError(f"--out {out}: holds another sweep; name another folder, or give the command as it was")
    if out.exists() and not kept.is_file() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds files but no sweep; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(told)


def _table(result: dict[str, Any]) -> Table:
    fields = [name for name in result["trials"][0] if name not in ("name", "score", "finished")]
    table = Table("trial", *fields, result["metric"], "")
    for trial in result["trials"]:
        score = "none" if trial["score"] is None else f"{trial['score']:.4f}"
        state = "best" if trial["name"] == result["best_trial"] else "" if trial["finished"] else "stopped early"
        table.add_row(trial["name"], *(str(trial[name]) for name in fields), score, state)
    return table


def _words(result: dict[str, Any]) -> Iterator[str]:
    spread = "" if result["standard_deviation"] is None else f", standard deviation {result['standard_deviation']:.4f}"
    yield f"mean {result['mean']:.4f}{spread}, best {result['best']:.4f} (trial {result['best_trial']})"
    shown = [n for n in (1, 2, 5, 10, 20, 50) if n <= len(result["expected_best"])]
    yield "expected best of " + ", ".join(f"{n}: {result['expected_best'][n - 1]:.4f}" for n in shown)
    floor = "" if result["floor"] is None else f"without learning {result['floor']:.4f}; "
    yield f"{floor}failed runs {result['share_failed']:.0%}"
    for name, found in (result["variance"] or {}).items():
        verdict = "matters" if found["p"] < 0.05 else "is not shown to matter"
        yield f"the seed of the {name} {verdict}: F({found['degrees']}, {found['rest']}) = {found['f']:.2f}, p = {found['p']:.3f}"


def _to_board(out: Path, result: dict[str, Any]) -> None:
    """Hyperparameters beside scores; the expected best of n runs as a curve over n. In place of what was there."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(out / FOLDER, ignore_errors=True)
    name = tag_of(result["metric"]) or result["metric"]
    with SummaryWriter(str(out / FOLDER)) as writer:
        for n, value in enumerate(result["expected_best"], start=1):
            writer.add_scalar("sweep/expected_best_of_n", value, n)
        for trial in result["trials"]:
            chosen = {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in trial.items()
            }
            score, trial_name = chosen.pop("score", None), chosen.pop("name")
            if isinstance(score, int | float):
                writer.add_hparams(chosen, {name: float(score)}, run_name=f"trial-{trial_name}")
