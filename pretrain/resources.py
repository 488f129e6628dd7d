"""What this host has for a run: memory, disk, devices; and whether its device computes right."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

CGROUPS = (  # limit and use, of version 2 and of version 1, as a container or a job sees its own
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
NO_LIMIT = 2**60  # version 1 says "none" by a number near 2^63
SMI = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
SMI_SECONDS = 10


def free_memory() -> int:
    """Bytes of the host's memory that this process and its like may still take, its own included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder, limit, used in CGROUPS:
        if (most := _number(folder / limit)) is not None and most < NO_LIMIT:
            free = min(free, max(most - (_number(folder / used) or 0) + _cached(folder), 0))
    return free


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # version 2 says "max"
        return None


def _cached(group: Path) -> int:
    """Bytes of files that the group's use counts and that go when they must."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))), 0
    )


def free_on_device(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def free_disk(folder: Path) -> tuple[int, str]:
    """Bytes for a folder that need not be there yet, and why it cannot be written; empty where it can."""
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return 0, f"{place} is not writable"
    return shutil.disk_usage(place).free, ""


def computes_right(device: torch.device) -> bool:
    """Whether a product of small whole numbers, which no rounding touches, comes out as on paper."""
    values = torch.arange(256 * 256, dtype=torch.int64).remainder(7).view(256, 256) - 3
    numbers = values.to(device, torch.float32)
    return torch.equal((numbers @ numbers.T).long().cpu(), values @ values.T)  # the host's in whole numbers


def broken_devices() -> list[str]:
    """GPUs of this host whose memory has met errors that it could not mend, as their driver counts them."""
    try:
        ran = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in ran.stdout.splitlines() if line.count(", ") == 1]
    return [index for index, errors in rows if errors.isdigit() and int(errors) > 0]
