"""A migration from one host to another, ten milliseconds away, over a link that fails once."""

from __future__ import annotations

import signal

import pytest
import trio

from vm.machine import Machine
from vm.playing import DEBIAN, ROOM, last, words

pytestmark = pytest.mark.vm

Pair = tuple[Machine, Machine]
ADDRESS, PORT = "10.0.0.1", 7000
ALL, SECOND = 2048, 256
"""Pages of the process, and those written after the second pre-dump."""


@pytest.mark.parametrize("rounds", [0, 2], ids=["plain", "hybrid"])
async def test_a_process_moves_over_a_link_that_fails(machines: Pair, rounds: int) -> None:
    async with machines[0].connect() as here, machines[1].connect() as there:
        for guest, address in ((here, ADDRESS), (there, "10.0.0.2")):
            await guest.join_network(address, delay="5ms", rate="4mbit")
            await guest.run(["rm", "-rf", ROOM])
        source = await here.start(words("source", DEBIAN, rounds=rounds, address=ADDRESS, port=PORT))
        frozen = last(await source.wait_for("counts"))
        assert frozen["counts"]["LAZY"] == (SECOND if rounds else ALL)
        await there.put_folder(ROOM, await here.get_folder(ROOM))
        destination = await there.start(
            words("destination", DEBIAN, pid=frozen["pid"], address=ADDRESS, port=PORT)
        )
        await destination.wait_for("running")
        machines[1].set_link(up=False)
        await trio.sleep(3)
        await here.join_network(ADDRESS, delay="5ms")  # fast from now on
        machines[1].set_link(up=True)
        arrived = last((await destination.succeed()).output)
        left = last((await source.succeed()).output)
    assert left["killed"] == signal.SIGKILL
    assert arrived["stats"]["pages_missing"] == 0
    assert arrived["stats"]["pages_total"] == frozen["counts"]["LAZY"]
    # It was lost while tasks ran and pages were missing, and came back.
    assert "restore finished" in arrived["log"].partition("trying to reach it again")[0]
    assert "bulk lane: connected" in arrived["log"].partition("trying to reach it again")[2]
