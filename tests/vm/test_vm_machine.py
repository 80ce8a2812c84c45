"""The virtual machine and its agent do what the other tests here take for granted."""

from __future__ import annotations

import signal

import pytest
import trio

from criupy.testing.wait import until
from vm.machine import GuestError, Machine, start

pytestmark = pytest.mark.vm

Pair = tuple[Machine, Machine]


async def test_commands(machines: Pair) -> None:
    async with machines[0].connect() as guest:
        done = await guest.run(
            ["sh", "-c", "cat; echo $GREETING; pwd"], data=b"in\n", env={"GREETING": "hello"}
        )
        assert done.output == "in\nhello\n/root\n"
        assert (await guest.run(["sh", "-c", "echo no >&2; exit 3"], check=False)).errors == "no\n"
        with pytest.raises(GuestError, match=r"(?s)ended with 3.*no"):
            await guest.run(["sh", "-c", "echo no >&2; exit 3"])
        with pytest.raises(GuestError, match=r"no-such-program.*No such file"):
            await guest.run(["no-such-program"])
        with pytest.raises(GuestError, match=r"(?s)took longer than 1 s.*begun"):
            await guest.run(["sh", "-c", "echo begun; sleep 1000"], timeout=1)
        assert (await guest.run(["uname", "-r"])).output.startswith("6.1.")


async def test_several_commands_at_once(machines: Pair) -> None:
    async with machines[0].connect() as guest:
        patient = await guest.start(["sh", "-c", "echo ready; read line; echo got $line"])
        await patient.wait_for("ready")
        assert (await guest.run(["echo", "meanwhile"])).output == "meanwhile\n"
        await patient.feed(b"a line\n")
        assert (await patient.wait()).output == "ready\ngot a line\n"
        endless = await guest.start(["sleep", "1000"])
        await endless.signal(signal.SIGINT)
        assert (await endless.wait()).code == -signal.SIGINT


async def test_files(machines: Pair) -> None:
    data = bytes(range(256)) * 8000
    async with machines[0].connect() as guest, machines[1].connect() as other:
        await guest.put("/root/files/one", data)
        assert await guest.get("/root/files/one") == data
        await guest.run(["ln", "-s", "one", "/root/files/two"])
        await other.put_folder("/root/copied", await guest.get_folder("/root/files"))
        assert await other.get("/root/copied/two") == data
        with pytest.raises(GuestError, match="No such file"):
            await guest.get("/root/none")


async def test_what_a_connection_started_ends_with_it(machines: Pair) -> None:
    async with machines[0].connect() as guest:
        process = await guest.start(["sh", "-c", "echo ready; sleep 1000 & sleep 1000"])
        await process.wait_for("ready")
    async with machines[0].connect() as guest:
        assert (await guest.run(["pgrep", "sleep"], check=False)).output == ""


async def test_a_panic_is_told_with_the_console() -> None:
    with start(memory=512) as machine:
        async with machine.connect() as guest:
            with pytest.raises(GuestError, match=r"(?s)it died.*sysrq: Trigger a crash"):
                await guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])
        with trio.fail_after(10):
            await until(lambda: not machine.is_running)
