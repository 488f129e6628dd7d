"""Names in a run's folder that the trainer shares with what starts it."""

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
LOGS = "logs"
STOP = "stop"  # this file asks to save and end
LAUNCH = "launch"  # of python -m launch: the job's script, and what became of it
BEFORE_THE_RUN = (LOGS, LAUNCH, STOP)  # what may be there before the run begins
