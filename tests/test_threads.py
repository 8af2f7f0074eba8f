"""The number of computing threads: from the flag, the environment or the usable cores."""

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
    allow_processors(monkeypatch, *range(8))
    return tmp_path


def allow_processors(monkeypatch: pytest.MonkeyPatch, *processors: int) -> None:
    monkeypatch.setattr(
        psutil.Process, "cpu_affinity", lambda self: list(processors), raising=False
    )


def add_control_group(system: Path, line: str, **files: str) -> None:
    """Put this process into a control group with these files."""
    (system / "proc/self").mkdir(parents=True, exist_ok=True)
    with (system / "proc/self/cgroup").open("a") as groups:
        groups.write(f"{line}\n")
    for path, text in files.items():
        file = system / "sys/fs/cgroup" / path.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def test_hyperthreads_of_one_core_count_once(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(system) == 4
    allow_processors(monkeypatch, 0, 4)
    assert usable_cores(system) == 1
    allow_processors(monkeypatch, 0, 1, 4)
    assert usable_cores(system) == 2


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1)],
)
def test_a_control_groups_limit_lowers_the_usable_cores(
    limit: str, cores: int, system: Path
) -> None:
    add_control_group(system, "0::/", cpu_dot_max=limit)
    assert usable_cores(system) == cores


def test_the_lowest_limit_of_nested_control_groups_counts(system: Path) -> None:
    add_control_group(
        system,
        "0::/slice/service",
        slice__cpu_dot_max="200000 100000",
        slice__service__cpu_dot_max="max 100000",
    )
    assert usable_cores(system) == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_version_1_control_groups_limit_counts_even_if_its_path_is_the_hosts(
    mount: str, system: Path
) -> None:
    limits = {"cpu_dot_cfs_quota_us": "100000", "cpu_dot_cfs_period_us": "50000"}
    files = {f"{mount}__{name}": text for name, text in limits.items()}
    add_control_group(system, "4:cpu,cpuacct:/docker/1234", **files)
    add_control_group(system, "2:memory:/docker/1234")
    assert usable_cores(system) == 2


def test_without_other_information_the_physical_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    allow_processors(monkeypatch, *range(8))
    assert usable_cores(tmp_path) == 4
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    assert usable_cores(tmp_path) == 4
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert usable_cores(tmp_path) == 1


def test_the_threads_flag_overrides_the_environment_which_overrides_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert settle_threads() == usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert settle_threads() == 3
    assert settle_threads(5) == 5
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_on_the_number_of_threads_that_was_set(threads: int) -> None:
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


def test_the_environment_may_decide_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    settle_threads()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    settle_threads()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
