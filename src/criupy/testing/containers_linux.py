"""Two hosts on one machine, and a web server in a container of runC that can move between them.

Each host is a network namespace with a runC of its own: its own state, its own
cgroup, its own copy of what the container is given. The hosts are joined by a
link of limited bandwidth; the containers' networks and that of a client hang at
a switch. The container has the same address on both hosts; ``Lab.switch_to`` says
where it is plugged in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criupy.errors import CriupyError
from criupy.runc._mounts_linux import mounts_below
from criupy.testing.criu_linux import caches
from criupy.testing.web_client import PAGES, page

__all__ = ["Client", "Host", "Lab", "find_root", "open_lab"]

SERVER = "10.77.1.10"
_CLIENT = "10.77.1.2"
_HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
_MAC = "02:00:00:00:77:10"

_NGINX = """
daemon off;
user root;
worker_processes 1;
error_log stderr;
pid /run/nginx.pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    keepalive_timeout 600;
    map_hash_max_size {hash_size};
    map_hash_bucket_size 128;
    map $uri $body {{ default none; include /srv/pages.conf; }}
    server {{ listen 80; location / {{ default_type text/plain; return 200 $body; }} }}
}}
"""


def find_root() -> Path | None:
    """Return the root file system that the set-up has made; None if it has not."""
    for cache in caches():
        if (cache / "root-12" / "made-from").exists():
            return cache / "root-12"
    return None


def _run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        raise CriupyError(f"{' '.join(map(str, words))}: {said}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Host:
    """One host: ``network`` is its namespace, ``address`` where the other reaches it.

    ``root`` is runC's state, ``bundle`` the container's, ``cgroup`` its path.
    """

    name: str
    network: str
    address: str
    container_network: str
    root: Path
    bundle: Path
    cgroup: str

    def words(self, *words: str | Path) -> list[str]:
        """Return the words that run a command on this host."""
        # Not `ip netns exec`, which would hide the cgroups with a /sys of its own.
        return ["nsenter", f"--net=/run/netns/{self.network}", *map(str, words)]

    def runc_program(self) -> Path:
        """Return a program that is runC on this host, whatever its state directory."""
        program = self.bundle / "runc"
        if not program.exists():
            program.write_text(f'#!/bin/sh\nexec {" ".join(self.words("runc"))} "$@"\n')
            program.chmod(0o755)
        return program

    def runc(self, *words: str | Path) -> list[str]:
        """Return the words of one of runC's commands on this host."""
        return self.words("runc", "--root", self.root, *words)

    def status(self, container: str) -> str | None:
        """Return the status of a container; None if there is none of that name."""
        done = subprocess.run(self.runc("state", container), capture_output=True, text=True, check=False)
        return None if done.returncode else str(json.loads(done.stdout)["status"])


class Client:
    """A client that keeps asking the server until it is told to stop."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def finish(self) -> dict[str, dict[str, float]]:
        """End it; return what it got over ``new`` connections and over the one that is ``kept``."""
        said, _ = self._process.communicate()
        found: dict[str, dict[str, float]] = json.loads(said)
        return found

    def kill(self) -> None:
        """End it without hearing from it."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class Lab:
    """Two hosts, ``a`` and ``b``, and the network around them; ``root`` is what the containers run in."""

    root: Path
    a: Host
    b: Host
    prefix: str
    path: str

    def start_server(self, host: Host, container: str) -> None:
        """Start the web server on a host, and wait until it answers."""
        log = host.bundle / "runc.log"
        done = subprocess.run(
            host.runc("--log", log, "run", "--detach", "--bundle", host.bundle, container),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise CriupyError(f"the container does not start: {log.read_text().strip()}")
        deadline = time.monotonic() + 30
        while not self.answers():
            if time.monotonic() > deadline:
                raise CriupyError("the web server does not answer")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Tell whether the server answers where it is plugged in."""
        program = (
            "import sys, socket; s = socket.create_connection((sys.argv[1], 80), 1); "
            "s.sendall(b'GET /7 HTTP/1.0\\r\\n\\r\\n'); s.settimeout(1); sys.exit(not s.recv(9))"
        )
        words = ["ip", "netns", "exec", f"{self.prefix}client", sys.executable, "-c", program, SERVER]
        return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def switch_to(self, host: Host) -> None:
        """Plug the container's address in on this host, and out on the other."""
        other = self.b if host is self.a else self.a
        switch = f"{self.prefix}switch"
        _run("ip", "-n", switch, "link", "set", f"to-{other.name}", "down")
        _run("ip", "-n", switch, "link", "set", f"to-{host.name}", "up")

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Run a client that keeps asking the server."""
        words = ["ip", "netns", "exec", f"{self.prefix}client", sys.executable, "-m"]
        process = subprocess.Popen(
            [*words, "criupy.testing.web_client", SERVER, "80"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        client = Client(process)
        try:
            yield client
        finally:
            client.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _make_site(site: Path) -> None:
    site.mkdir()
    pages = "".join(f"/{number} {page(number)};\n" for number in range(PAGES))
    (site / "pages.conf").write_text(pages)
    (site / "nginx.conf").write_text(_NGINX.format(hash_size=PAGES * 4))


def _make_bundle(bundle: Path, root: Path, site: Path, network: str, cgroup: str, address: str) -> None:
    bundle.mkdir()
    _run("runc", "spec", "--bundle", bundle)
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["process"] |= {"terminal": False, "args": ["/usr/sbin/nginx", "-c", "/srv/nginx.conf"]}
    # Up to 1.2 runC has no option for connections that wait to be accepted, and CRIU up to 4.2 takes the
    # address of a lazy dump from a configuration only.
    (bundle / "criu.conf").write_text(f"skip-in-flight\naddress {address}\n")
    config["annotations"] = {"org.criu.config": str(bundle / "criu.conf")}
    # Limits of a task of another user cannot be read without CAP_SYS_RESOURCE.
    config["process"].pop("rlimits", None)
    config["root"] = {"path": str(root), "readonly": True}
    config["linux"]["cgroupsPath"] = cgroup
    for namespace in config["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = f"/run/netns/{network}"
    mounts = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
    mounts += [
        {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
        for place in ("/var/lib/nginx", "/var/log/nginx", "/run")
    ]
    mounts.append({"destination": "/srv", "type": "bind", "source": str(site), "options": ["bind", "ro"]})
    config["mounts"] = mounts
    path.write_text(json.dumps(config, indent=1))


def _join(one: str, name: str, other: str, other_name: str) -> None:
    _run("ip", "-n", one, "link", "add", name, "type", "veth", "peer", "name", other_name, "netns", other)


def _make_network(prefix: str, rate: str) -> None:
    names = {name: f"{prefix}{name}" for name in ("switch", "client", "a", "b", "ca", "cb")}
    for network in names.values():
        _run("ip", "netns", "add", network)
        _run("ip", "-n", network, "link", "set", "lo", "up")
    _join(names["a"], "host", names["b"], "host")
    for host, address in _HOSTS.items():
        _run("ip", "-n", names[host], "address", "add", f"{address}/24", "dev", "host")
        _run("ip", "-n", names[host], "link", "set", "host", "up")
        tbf = ("rate", rate, "burst", "256kb", "latency", "50ms")
        _run("tc", "-n", names[host], "qdisc", "add", "dev", "host", "root", "tbf", *tbf)
    switch = names["switch"]
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for port, network, address in (("client", "client", _CLIENT), ("a", "ca", SERVER), ("b", "cb", SERVER)):
        _join(switch, f"to-{port}", names[network], "eth0")
        _run("ip", "-n", switch, "link", "set", f"to-{port}", "master", "bridge")
        if port != "client":
            _run("ip", "-n", names[network], "link", "set", "eth0", "address", _MAC)
        _run("ip", "-n", names[network], "address", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", names[network], "link", "set", "eth0", "up")
    for port in ("client", "a"):
        _run("ip", "-n", switch, "link", "set", f"to-{port}", "up")


def _remove_network(prefix: str) -> None:
    for name in ("ca", "cb", "a", "b", "client", "switch"):
        subprocess.run(["ip", "netns", "delete", f"{prefix}{name}"], capture_output=True, check=False)


def _remove_containers(host: Host) -> None:
    """Delete every container of a host, and whatever still runs in its cgroup."""
    for place in mounts_below(host.root):
        _run("umount", "--lazy", place)
    listed = subprocess.run(host.runc("list", "--quiet"), capture_output=True, text=True, check=False)
    for container in listed.stdout.split():
        subprocess.run(host.runc("delete", "--force", container), capture_output=True, check=False)
    for base in Path("/sys/fs/cgroup").glob("**/" + host.cgroup.lstrip("/")):
        with contextlib.suppress(OSError):
            for pid in (base / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            base.rmdir()


@contextlib.contextmanager
def open_lab(
    directory: Path, root: Path, criu: Path, *, prefix: str | None = None, rate: str = "400mbit"
) -> Iterator[Lab]:
    """Make the hosts in a directory; everything in them is gone on leaving."""
    prefix = prefix or f"criupy{os.getpid()}-"
    path = os.pathsep.join((str(criu.parent), os.environ.get("PATH", os.defpath)))
    hosts = {}
    shown = directory / "root"
    shown.mkdir(parents=True)
    for name, address in _HOSTS.items():
        home = directory / name
        home.mkdir()
        _make_site(home / "site")
        network, cgroup = f"{prefix}c{name}", f"/{prefix}{name}"
        _make_bundle(home / "bundle", shown, home / "site", network, cgroup, address)
        hosts[name] = Host(name, f"{prefix}{name}", address, network, home / "state", home / "bundle", cgroup)
    lab = Lab(shown, hosts["a"], hosts["b"], prefix, path)
    try:
        # Nothing that is deleted by mistake through a mount of it may reach the root itself.
        _run("mount", "--bind", root, shown)
        _run("mount", "-o", "remount,bind,ro", shown)
        _make_network(prefix, rate)
        yield lab
    finally:
        for host in hosts.values():
            _remove_containers(host)
        _remove_network(prefix)
        for place in mounts_below(directory):
            _run("umount", "--lazy", place)
        shutil.rmtree(directory, ignore_errors=True)
