"""The disks of the virtual machine: one that seldom changes, and one with criupy as it is installed here.

What goes in is made by `tools/setup root criu vm`. Disks are made anew when what is in them changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from criupy.testing.criu_linux import caches

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "vm"
HERE = Path(__file__).parent

MODULES = ("virtio_pci", "virtio_blk", "ext4", "virtio_console", "virtio_net")
"""Those that the guest needs before it can load its own."""


class Missing(Exception):
    """Something that the virtual machine is made of is not there."""


@dataclass(frozen=True, slots=True)
class Disks:
    """What QEMU boots: each file is complete, and is never written to."""

    kernel: Path
    initrd: Path
    base: Path
    criupy: Path


def find_made(name: str) -> Path:
    """Find something of Debian 12 in the cache: `root-12` or `kernel-12`."""
    for cache in caches():
        if (cache / name / "made-from").exists():
            return cache / name
    raise Missing(f"no {name} in {' or in '.join(map(str, caches()))}: run `tools/setup root vm` as root")


def find_criu_prefixes() -> list[Path]:
    """The private CRIUs, which are put at the same place in the guest."""
    found = [
        path for cache in caches() for path in sorted(cache.glob("criu-*")) if (path / "bin/criu").exists()
    ]
    if not found:
        raise Missing("no private criu in the cache: run `tools/setup criu`")
    return found


def make_disks() -> Disks:
    """Make the disks that are missing, and return them."""
    if platform.machine() != "x86_64":
        raise Missing("the virtual machine is one for x86-64")
    if os.geteuid() != 0:
        raise Missing("making the disks of the virtual machine needs root")
    for tool in ("qemu-system-x86_64", "mke2fs"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed: run `tools/setup vm`")
    root, kernel, site = find_made("root-12"), find_made("kernel-12"), BUILD / "site"
    if not site.is_dir():
        raise Missing(f"{site} is not there: run `tools/setup vm`")
    prefixes = find_criu_prefixes()
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = digest([Path(__file__), HERE / "init.sh"])
        stamps = [path / "made-from" for path in (root, kernel, *prefixes)]
        base = BUILD / f"base-{digest([*stamps], recipe)}.ext4"
        initrd = base.with_suffix(".initrd")
        if not (base.exists() and initrd.exists()):
            remove("base-*")
            make_base(base, initrd, root, kernel, prefixes)
        files = sorted(installed())
        guest = [HERE / "agent.py", HERE / "scenarios.py", HERE.parent / "migrating.py"]
        criupy = BUILD / f"criupy-{digest([*files, *guest, site / '.made-from'], recipe)}.ext4"
        if not criupy.exists():
            remove("criupy-*")
            make_criupy(criupy, root, site, guest)
    return Disks(kernel / "vmlinuz", initrd, base, criupy)


def digest(files: Iterable[Path], before: str = "") -> str:
    found = hashlib.sha256(before.encode())
    for path in files:
        found.update(hashlib.sha256(path.read_bytes()).digest() + str(path).encode())
    return found.hexdigest()[:16]


def remove(pattern: str) -> None:
    for old in BUILD.glob(pattern):
        old.unlink()


def installed() -> Iterator[Path]:
    """The files of the installed package, without bytecode."""
    files = importlib.metadata.files("criupy")
    assert files is not None
    for file in files:
        path = Path(str(file.locate()))
        if file.parts[0] == "criupy" and path.suffix != ".pyc":
            yield path


def run(*words: str | Path) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(f"{words[0]} failed: {(done.stderr or done.stdout).strip()}")


def make_disk(path: Path, folder: Path, size: str) -> None:
    """Make a file system of what is in a folder, without mounting it."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", folder, partial, size)
    partial.rename(path)


def make_base(disk: Path, initrd: Path, root: Path, kernel: Path, prefixes: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".base-") as name:
        folder = Path(name) / "root"
        run("cp", "-a", "--reflink=auto", root, folder)
        (folder / "opt/criupy").mkdir()
        modules = folder / "usr/lib/modules"
        run("cp", "-a", "--reflink=auto", kernel / "modules", modules)
        for prefix in prefixes:
            place = folder / prefix.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-a", "--reflink=auto", prefix, place)
        (version,) = (path.name for path in modules.iterdir())
        run("chroot", folder, "depmod", version)
        make_initrd(initrd, Path(name) / "initrd", root, modules / version)
        make_disk(disk, folder, "6G")


def make_initrd(path: Path, folder: Path, root: Path, modules: Path) -> None:
    """Make the initial RAM disk: busybox, and the modules without which there is no disk."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, before = line.partition(":")
        needs[file.rpartition("/")[2].removesuffix(".ko")] = [*reversed(before.split()), file]
    order = list(dict.fromkeys(file for name in MODULES for file in needs.get(name, ())))  # or built in
    (folder / "bin").mkdir(parents=True)
    (folder / "modules").mkdir()
    busybox = root / "usr/bin/busybox"
    shutil.copy(busybox, folder / "bin/busybox")
    shutil.copy(HERE / "init.sh", folder / "init")
    (folder / "init").chmod(0o755)
    for module in order:
        shutil.copy(modules / module, folder / "modules")
    (folder / "modules/order").write_text("\n".join(module.rpartition("/")[2] for module in order) + "\n")
    names = "\n".join(str(each.relative_to(folder)) for each in sorted(folder.rglob("*")))
    partial = path.with_suffix(".partial")
    with partial.open("wb") as archive:
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            cwd=folder,
            input=names.encode(),
            stdout=archive,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    partial.rename(path)


def make_criupy(disk: Path, root: Path, site: Path, guest: list[Path]) -> None:
    """The installed package, what it depends on for the guest's Python, and the programs beside this file."""
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".criupy-") as name:
        folder = Path(name) / "criupy"
        shutil.copytree(site, folder / "site")
        (package,) = {
            path for path in importlib.metadata.files("criupy") or () if str(path) == "criupy/__init__.py"
        }
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(str(package.locate())).parent, folder / "site/criupy", ignore=ignored)
        for path in guest:
            shutil.copy(path, folder)
        (folder / "bin").mkdir()
        for point in importlib.metadata.entry_points(group="console_scripts"):
            if point.dist is not None and point.dist.name == "criupy":
                script = folder / "bin" / point.name
                script.write_text(
                    f"#!/usr/bin/python3\nimport sys\nfrom {point.module} import {point.attr}\n"
                    f"sys.exit({point.attr}())\n"
                )
                script.chmod(0o755)
        compile_for_guest(root, folder)
        make_disk(disk, folder, "128M")


def compile_for_guest(root: Path, folder: Path) -> None:
    """Compile all modules with the guest's own Python: there it would take long, each time."""
    python = root / "usr/bin/python3.11"
    loader = next((root / "usr/lib64").glob("ld-linux-*"), root / "lib64/ld-linux-x86-64.so.2")
    libraries = root / "usr/lib/x86_64-linux-gnu"
    command: list[str | Path] = [
        loader,
        "--library-path",
        libraries,
        python,
        "-I",
        "-m",
        "compileall",
        "-q",
        "-j",
        "2",
    ]
    command += ["--invalidation-mode", "unchecked-hash", folder]
    environment = {"PYTHONHOME": str(root / "usr"), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.stderr.write(f"modules for the guest are not compiled: {done.stdout or done.stderr}\n")
