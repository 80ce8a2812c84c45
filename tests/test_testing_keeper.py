"""Nothing that a keeper keeps outlives it."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import trio
import trio.testing

from criupy.testing._keeper_linux import KeeperError, keep
from criupy.testing.wait import until


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text[text.rindex(")") + 2] not in "ZX"


ORPHANS = "for i in 1 2 3; do (setsid sh -c 'sleep 1000 & echo $!; wait' &) ; done; sleep 1000"


def words(output: Path) -> list[str]:
    return output.read_text().split()


async def descendants(output: Path, count: int) -> list[int]:
    await until(lambda: len(words(output)) >= count)
    return [int(word) for word in words(output)]


async def test_exit_status_signal_and_usage(workload_program: Path, tmp_path: Path) -> None:
    async with keep(["sh", "-c", "exit 7"], keeper=workload_program, output=tmp_path / "out") as kept:
        ended = await kept.wait()
        assert (ended.code, ended.signal, ended.pid) == (7, None, kept.pid)
        assert 0 < ended.max_rss < 1 << 30
    async with keep(["sleep", "1000"], keeper=workload_program, output=tmp_path / "out") as kept:
        kept.terminate()
        assert (await kept.wait()).signal == signal.SIGTERM
        kept.terminate()  # too late is no error


async def test_orphans_are_reaped_and_reported(workload_program: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    async with keep(
        ["sh", "-c", "sh -c 'echo $$; exec sleep 0.05' &"], keeper=workload_program, output=output
    ) as kept:
        (orphan,) = await descendants(output, 1)
        assert (await kept.wait()).code == 0
        assert (await kept.wait(orphan)).code == 0


async def test_all_descendants_end_on_leaving(workload_program: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with trio.CancelScope() as scope:
        async with keep(["sh", "-c", ORPHANS], keeper=workload_program, output=output) as kept:
            pids = [kept.pid, *await descendants(output, 3)]
            assert all(map(alive, pids))
            scope.cancel()
            await trio.sleep(math.inf)
    assert scope.cancelled_caught
    assert not any(map(alive, pids))
    assert kept.ended.keys() >= set(pids)


async def test_all_descendants_end_when_python_is_killed(workload_program: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = f"""
        import trio
        from pathlib import Path
        from criupy.testing._keeper_linux import keep

        async def main():
            async with keep(["sh", "-c", {ORPHANS!r}], keeper=Path({str(workload_program)!r}),
                            output=Path({str(output)!r})):
                await trio.sleep_forever()

        trio.run(main)
    """
    output.touch()
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", textwrap.dedent(script)]
        process = await nursery.start(functools.partial(trio.run_process, command, check=False))
        pids = await descendants(output, 3)
        process.kill()
    await until(lambda: not any(map(alive, pids)))


async def test_descriptors_for_the_command_are_not_kept(workload_program: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    script = f"import os, time; os.write({writing}, b'here'); os.close({writing}); time.sleep(1e6)"
    command = [sys.executable, "-c", script]
    async with (
        trio.lowlevel.FdStream(reading) as stream,
        keep(command, keeper=workload_program, output=tmp_path / "out", pass_fds=[writing]),
    ):
        os.close(writing)
        assert await stream.receive_some() == b"here"
        assert await stream.receive_some() == b""


async def test_a_command_that_is_not_there(workload_program: Path, tmp_path: Path) -> None:
    async with keep(["/nonexistent"], keeper=workload_program, output=tmp_path / "out") as kept:
        assert (await kept.wait()).code == 127
    assert "start /nonexistent: No such file" in (tmp_path / "out").read_text()


async def test_namespace(workload_program: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a pid namespace needs root")
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    mine.write_text("mine")
    yours.write_text("yours\n")
    output = tmp_path / "out"
    async with keep(
        ["sh", "-c", f"cat {mine}; echo $$; sleep 1000"],
        keeper=workload_program,
        output=output,
        namespace=True,
        binds={mine: yours},
    ) as kept:
        await until(lambda: len(words(output)) >= 2)
        assert words(output) == ["yours", str(kept.pid)]
        host = kept.host_pid(kept.pid)
        assert host != kept.pid
        assert alive(host)
        assert kept.is_alive(kept.pid)
        assert not kept.is_alive(30_000)
        with pytest.raises(ProcessLookupError):
            kept.host_pid(30_000)
        kept.kill()
        assert (await kept.wait()).signal == 9
    assert mine.read_text() == "mine"
    assert not alive(host)


async def test_waiting_for_what_never_was_ends_with_the_keeper(
    workload_program: Path, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:

        async def wait_for_nobody() -> None:
            with pytest.raises(KeeperError):
                await kept.wait(1)

        async with keep(["sleep", "1000"], keeper=workload_program, output=tmp_path / "out") as kept:
            nursery.start_soon(wait_for_nobody)
            await trio.testing.wait_all_tasks_blocked()
