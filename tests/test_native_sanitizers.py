"""The native core, and TLS, under AddressSanitizer, UndefinedBehaviourSanitizer and ThreadSanitizer.

The C drivers in tests/native are compiled with the sources they test, by gcc.
The stress target is not sanitized: a shadow memory is no part of what migrates.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from criupy._tls.tls_linux import is_available
from criupy.testing.certificates import Certificates
from test_native_uffd import needs_poison, usable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src/criupy/_uffd"
TLS_SOURCES = ROOT / "src/criupy/_tls"
DRIVERS = ROOT / "tests/native"
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-D_GNU_SOURCE", "-pthread"]
RUNTIMES = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
PURE = ["codec", "histogram", "image", "notices", "space", "translate"]
CORE = [
    *PURE,
    "link",
    "pager",
    "pager_api",
    "pager_copier",
    "pager_end",
    "pager_fetch",
    "pager_install",
    "pager_lane",
    "pager_reply",
    "pager_request",
    "pager_task",
    "pager_window",
    "uffd",
]

SERVER = [
    "codec",
    "image",
    "link",
    "server",
    "server_answer",
    "server_connection",
    "server_receive",
    "server_session",
    "server_stream",
    "server_upstream",
    "upstream",
    "upstream_cache",
    "upstream_link",
]

TLS = ["context", "fault", "session", "tickets"]

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a driver with some of the core, each file once for each sanitizer."""
    directory = tmp_path_factory.mktemp("native")
    gcc = shutil.which("gcc")

    def compile_driver(driver: str, parts: list[str], sanitizer: str, *, tls: bool = False) -> Path:
        if gcc is None:
            pytest.skip("gcc is not installed")
        for runtime in RUNTIMES.get(sanitizer, ()):
            # gcc answers with the bare name for what it does not have.
            found = subprocess.check_output([gcc, f"-print-file-name={runtime}"], text=True).strip()
            if not Path(found).is_absolute():
                pytest.skip(f"gcc has no {runtime}")
        program = directory / f"{driver}-{sanitizer}"
        if not program.exists():
            sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
            directories = TLS_SOURCES if tls else SOURCES
            flags = [*FLAGS, *sanitize, f"-I{SOURCES}", f"-I{directories}"]

            def compiled(source: Path) -> Path:
                target = directory / f"{source.parent.name}-{source.stem}-{sanitizer}.o"
                if not target.exists():
                    subprocess.run([gcc, *flags, "-c", source, "-o", target], check=True)
                return target

            sources = [DRIVERS / f"{driver}.c", *(directories / f"{part}.c" for part in parts)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled, sources))
            libraries = ["-lssl", "-lcrypto"] if tls else []
            subprocess.run([gcc, *flags, *objects, *libraries, "-o", program], check=True)
        return program

    return compile_driver


def run(*command: str | Path) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]
    return result.stdout


@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_pure_parts(build: Build, sanitizer: str) -> None:
    program = build("space_fuzz", PURE, sanitizer)
    # Under ThreadSanitizer only the ring of notices is of interest, and all is slow.
    seeds, rounds = (range(1, 2), "5") if sanitizer == "thread" else (range(1, 4), "120")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda seed: run(program, str(seed), rounds), seeds))


#: A link of so many megabytes a second and so many microseconds of round trip.
@pytest.mark.parametrize(
    ("bandwidth", "round_trip"), [(125, 10000), (1250, 10000), (125, 50000), (1250, 1000)]
)
@pytest.mark.parametrize("what", ["calm", "noisy", "longer", "slower", "faster"])
def test_bulk_leaves_the_queue_of_a_link_nearly_empty(
    build: Build, bandwidth: int, round_trip: int, what: str
) -> None:
    """A fault sees little more than the bare round trip, and background has nearly all of the link, soon."""
    program = build("window_sim", ["pager_window"], "")
    for seed in range(1, 6):
        printed = run(program, str(bandwidth), str(round_trip), str(seed), what)
        used, median, most, _, soon = map(float, printed.split())
        assert used > 0.9, printed
        assert soon > 0.8, printed
        # A request, and a little queue, take 0.3 ms at least.
        assert median < (1.25 if round_trip >= 10000 else 1.6), printed
        assert most < {10000: 1.4, 50000: 1.5, 1000: 2}[round_trip] + (0.5 if what == "noisy" else 0), printed


@pytest.mark.parametrize("what", ["calm", "longer", "slower"])
def test_bulk_leaves_little_in_the_queue_of_a_short_link(build: Build, what: str) -> None:
    """On a fast one the window is fixed, on a slow one measured: a fault waits about half a millisecond."""
    program = build("window_sim", ["pager_window"], "")
    for seed in range(1, 6):
        printed = run(program, "1250", "100", str(seed), what)
        used, median, *_ = map(float, printed.split())
        assert used > 0.9, printed
        assert median < 7, printed


@pytest.mark.skipif(bool(usable()), reason=usable())
@pytest.mark.parametrize(
    "how",
    [
        "finish",
        "early",
        pytest.param("poison", marks=needs_poison),
        pytest.param("destroy", marks=needs_poison),
    ],
)
@pytest.mark.parametrize("lanes", ["1", "2", "1+", "2+"])
@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_pager_under_load(build: Build, sanitizer: str, lanes: str, how: str) -> None:
    target = build("stress_target", ["uffd"], "")
    program = build("pager_stress", CORE, sanitizer)
    for seed in range(1, 4):
        run(program, target, str(seed), "1000", lanes, how)


@pytest.mark.skipif(bool(usable()), reason=usable())
@pytest.mark.parametrize("how", ["finish", "early", pytest.param("destroy", marks=needs_poison)])
@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_pager_under_load_from_a_pages_file(build: Build, sanitizer: str, how: str) -> None:
    target = build("stress_target", ["uffd"], "")
    program = build("pager_stress", CORE, sanitizer)
    for seed in range(1, 3):
        run(program, target, str(seed), "600", "0", how)


@pytest.mark.skipif(bool(usable()), reason=usable())
def test_a_fault_does_not_wait_for_what_copiers_read(build: Build) -> None:
    """It may wait for one read by the pager, and for none behind it."""
    assert float(run(build("pager_slow_file", CORE, ""))) < 1.5


@pytest.mark.skipif(bool(usable()), reason=usable())
def test_what_is_waited_for_is_put_in_place_first(build: Build) -> None:
    """The page of a fault, though four pages that nobody waits for came before it."""
    program = build("pager_order", CORE, "")
    for _ in range(20):
        assert run(program).split() == ["40", "0"]


@pytest.mark.skipif(bool(usable()), reason=usable())
@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_every_restore_ends(build: Build, sanitizer: str) -> None:
    run(build("pager_ends", CORE, sanitizer), "50" if sanitizer else "300")


@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_page_server_under_load(build: Build, sanitizer: str) -> None:
    program = build("server_stress", SERVER, sanitizer)
    for seed in range(1, 4):
        run(program, str(seed), "60")


@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_upstream_under_load(build: Build, sanitizer: str) -> None:
    program = build("upstream_stress", SERVER, sanitizer)
    for seed in range(1, 4):
        run(program, str(seed), "60")


@pytest.mark.skipif(not is_available(), reason="this build has no TLS")
@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_tls_sessions_in_threads(build: Build, certificates: Certificates, sanitizer: str) -> None:
    program = build("tls_stress", TLS, sanitizer, tls=True)
    run(program, certificates.directory, "100")
