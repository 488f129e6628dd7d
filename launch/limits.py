"""What a run's container may have of its host, whoever starts it (`job.py` over ssh, a job of Slurm's by its script)."""

from __future__ import annotations

# The host's network, since the ranks of all hosts talk to each other, and no rights but those of its user.
CONFINED = ("--rm", "--init", "--network=host", "--cap-drop=ALL", "--security-opt=no-new-privileges")
# RDMA pins memory; NCCL and compilers want stack.
FOR_GPUS = ("--ulimit=memlock=-1", "--ulimit=stack=67108864")
# Of the container's own /dev/shm, through which NCCL moves what the ranks in it tell each other; Docker's own is 64 MiB.
SHM_SIZE = "16g"
# For ranks that have a container each: NCCL takes those that do not share a /dev/shm for ranks of different machines, and
# then uses neither NVLink nor memory between them.
SHARED = "--ipc=host"
