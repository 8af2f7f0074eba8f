"""The number of computing threads, and how they wait. Set both before torch is imported."""

import os
from pathlib import Path

import psutil

SYSTEM = Path("/")  # the directory of Linux's proc and sys


def settle_threads(threads: int | None = None) -> int:
    """Set and return the number of threads that torch computes on, and set how they wait.

    threads: by default OMP_NUM_THREADS, or else `usable_cores`.

    Torch and its libraries read the environment when they are imported, so call this first. A
    thread without work first waits actively (it spins), then sleeps. Unless the environment sets
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, it spins for a shorter time than by GNU OpenMP's default.
    With the default, one other busy process slows each token twentyfold (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # The variable may be a list, for nested teams; torch has one level.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads is None:
        threads = int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def usable_cores(system: Path = SYSTEM) -> int:
    """Count the physical cores that affinity and control groups let this process use; at least 1.

    Two hyperthreads count as one core, because they share its arithmetic units. A limit is rounded
    down to whole cores, because a thread that is stopped half of the time delays all threads.
    """
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # Linux, Windows
        cores = len({_core(system, number) for number in process.cpu_affinity()})
        cores = min(cores, psutil.cpu_count(logical=False) or cores)
    else:
        cores = psutil.cpu_count(logical=False) or 1
    return max(1, int(min([cores, *_quotas(system)])))


def _core(system: Path, processor: int) -> str:
    """The name of a processor's core: the list of processors that share the core."""
    topology = system / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def _quotas(system: Path) -> list[float]:
    """The limits, in processors, of the control groups that this process is in.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max), and
    Documentation/scheduler/sched-bwc.rst for version 1.
    """
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[float] = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = system / "sys/fs/cgroup"
        # In version 1, "cpu" is often a link to "cpu,cpuacct", but not on every system.
        tops = [mounts / "cpu", mounts / controllers] if controllers else [mounts]
        top = next((t for t in tops if t.is_dir()), mounts)
        inner = top / path.strip("/")
        # In a container the path may be the host's; the container's group is then at the top.
        for directory in (inner, *inner.parents):
            if directory.is_relative_to(top):
                found += _quota(directory)
    return found


def _quota(directory: Path) -> list[float]:
    """The limit of one control group, or an empty list."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text()
    except (OSError, ValueError):
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]
