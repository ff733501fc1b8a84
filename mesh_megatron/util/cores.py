"""Number of CPU cores available to this process."""

import os
from pathlib import Path


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of cores in the process's affinity, but at most the container's CPU limit; at least 1.

    ``limit`` is the cgroup file with that limit: microseconds of CPU time (or "max") per period of microseconds.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        computing, period = map(int, limit.read_text().split())
    except (OSError, ValueError):  # no container, or no limit
        return count
    return max(1, min(count, computing // period))
