"""How many cores this process may use."""

import os
from pathlib import Path


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Those that it may run on, and of a container with a share of them no more; at least 1.

    ``limit`` is the kernel's file of that share: microseconds of computing in every so many, or "max".
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        computing, period = map(int, limit.read_text().split())
    except (OSError, ValueError):  # no container, or no limit
        return count
    return max(1, min(count, computing // period))
