"""Names that the trainer, and `prepare`, share with what starts them: in a run's folder, and beside a folder of shards."""

from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
LOGS = "logs"
STOP = "stop"  # this file asks to save and end
LAUNCH = "launch"  # of python -m launch: the job's script, and what became of it
BEFORE_THE_RUN = (LOGS, LAUNCH, STOP)  # what may be there before the run begins


def draft_of(out: Path) -> Path:
    """The hidden folder beside `out` in which it is made, and which becomes it when all of it is there."""
    return out.parent / f".{out.name}.preparing"


PLAN = "work/plan.json"  # in the draft of a folder of shards: what `prepare --plan` cut its texts into
