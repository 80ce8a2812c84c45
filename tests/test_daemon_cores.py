"""Cores that a container leaves to the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criupy.lazy_pages._cores_linux import usable_cores


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/daemon\n")
    (tmp_path / "sys/fs/cgroup/pod/daemon").mkdir(parents=True)
    return tmp_path


def limit(root: Path, group: str, said: str) -> None:
    (root / "sys/fs/cgroup" / group / "cpu.max").write_text(f"{said}\n")


def test_without_a_quota_it_is_the_affinity(root: Path) -> None:
    limit(root, "pod/daemon", "max 100000")
    assert usable_cores(root) == 8


@pytest.mark.parametrize(
    ("said", "cores"), [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("20000 10000", 2)]
)
def test_a_quota_leaves_whole_cores_and_one_at_least(root: Path, said: str, cores: int) -> None:
    limit(root, "pod/daemon", said)
    assert usable_cores(root) == cores


def test_the_quota_of_a_group_around_it_counts(root: Path) -> None:
    limit(root, "pod", "300000 100000")
    limit(root, "pod/daemon", "max 100000")
    assert usable_cores(root) == 3


def test_in_a_container_the_root_is_its_own_group(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/\n")
    limit(root, "", "100000 100000")
    assert usable_cores(root) == 1


def test_other_hierarchies_and_no_proc_mean_no_quota(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("4:cpu,cpuacct:/pod\n")
    limit(root, "pod", "100000 100000")
    assert usable_cores(root) == 8
    (root / "proc/self/cgroup").unlink()
    assert usable_cores(root) == 8


def test_here() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
