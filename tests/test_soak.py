"""The soak: what stands still is said and ended, and is a failure."""

import asyncio
import multiprocessing
import signal
from multiprocessing.queues import Queue

import pytest

from tests.soak import _tell, follow


def _stands_still(done: "Queue[int]") -> None:
    signal.signal(signal.SIGUSR1, _tell)
    done.put(5)

    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    asyncio.run(waits_for_nothing())


def test_what_gets_no_further_is_ended_and_says_where_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    done: Queue[int] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_stands_still, args=(done,))
    process.start()
    said: list[int] = []
    assert follow([process], done, said.append, stalled_s=1.0) == 5
    assert said == [5]
    assert process.exitcode == -signal.SIGKILL
    assert "waits_for_nothing" in capfd.readouterr().err
