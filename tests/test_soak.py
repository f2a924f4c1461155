"""The soak: what stands still is said and ended, and is a failure."""

import asyncio
import gc
import multiprocessing
import signal
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event

import pytest

from tests.soak import _tell, follow


def _stands_still(ready: Event) -> None:
    gc.freeze()  # what all tests before this one have left is inherited: to look through it may take seconds
    signal.signal(signal.SIGUSR1, _tell)

    async def waits_for_nothing() -> None:
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(waits_for_nothing())


def test_what_gets_no_further_is_ended_and_says_where_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    done: Queue[int] = multiprocessing.Queue()
    ready = multiprocessing.Event()
    process = multiprocessing.Process(target=_stands_still, args=(ready,))
    process.start()
    assert ready.wait(60)
    done.put(5)
    said: list[int] = []
    assert follow([process], done, said.append, stalled_s=1.0) == 5
    assert said == [5]
    assert process.exitcode == -signal.SIGKILL
    assert "waits_for_nothing" in capfd.readouterr().err
