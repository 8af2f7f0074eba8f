"""How many threads compute: what the process may use, and what is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stream_generator.threads import settle_threads, usable_cores

ROOT = Path(__file__).parent.parent


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyperthreads each, all usable: processors n and n + 4 share a core."""
    for number in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    may_use(monkeypatch, *range(8))
    return tmp_path


def may_use(monkeypatch: pytest.MonkeyPatch, *processors: int) -> None:
    monkeypatch.setattr(
        psutil.Process, "cpu_affinity", lambda self: list(processors), raising=False
    )


def group(system: Path, line: str, **files: str) -> None:
    """A control group of this process, with what its files say."""
    (system / "proc/self").mkdir(parents=True, exist_ok=True)
    with (system / "proc/self/cgroup").open("a") as groups:
        groups.write(f"{line}\n")
    for path, text in files.items():
        file = system / "sys/fs/cgroup" / path.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def test_hyperthreads_of_one_core_count_once(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(system) == 4
    may_use(monkeypatch, 0, 4)
    assert usable_cores(system) == 1
    may_use(monkeypatch, 0, 1, 4)
    assert usable_cores(system) == 2


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1)],
)
def test_a_control_groups_limit_holds(limit: str, cores: int, system: Path) -> None:
    group(system, "0::/", cpu_dot_max=limit)
    assert usable_cores(system) == cores


def test_the_narrowest_of_nested_groups_holds(system: Path) -> None:
    group(
        system,
        "0::/slice/service",
        slice__cpu_dot_max="200000 100000",
        slice__service__cpu_dot_max="max 100000",
    )
    assert usable_cores(system) == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_limit_of_version_1_holds_also_where_the_path_is_the_hosts(
    mount: str, system: Path
) -> None:
    limits = {"cpu_dot_cfs_quota_us": "100000", "cpu_dot_cfs_period_us": "50000"}
    files = {f"{mount}__{name}": text for name, text in limits.items()}
    group(system, "4:cpu,cpuacct:/docker/1234", **files)
    group(system, "2:memory:/docker/1234")
    assert usable_cores(system) == 2


def test_where_nothing_is_told_the_physical_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    may_use(monkeypatch, *range(8))
    assert usable_cores(tmp_path) == 4
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    assert usable_cores(tmp_path) == 4
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert usable_cores(tmp_path) == 1


def test_the_flag_comes_first_then_the_environment_then_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert settle_threads() == usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert settle_threads() == 3
    assert settle_threads(5) == 5
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_on_as_many_threads(threads: int) -> None:
    program = (
        "from stream_generator.threads import settle_threads\n"
        f"settle_threads({threads})\n"
        "import torch\n"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == threads


def test_how_threads_wait_is_left_to_an_environment_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    settle_threads()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    settle_threads()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
