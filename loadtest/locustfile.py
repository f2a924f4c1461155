"""What Locust's users do in `loadtest.scenarios.ramp`: images, one after another, as fast as they come.

Their number grows evenly from 1 to ``LOADTEST_USERS`` in ``LOADTEST_SECONDS``. Latencies go to files of HDR histograms
(`loadtest.measures`), one of each process that lasted until the end, because Locust itself rounds them.
``LOADTEST_REQUESTS``: the requests, as JSON.
"""

import os
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from locust import LoadTestShape, constant, events, task
from locust.contrib.fasthttp import FastHttpUser
from locust.runners import WorkerRunner

from loadtest.generator import Request
from loadtest.measures import Answer, Recorder, server_timing

USERS: Final = int(os.environ["LOADTEST_USERS"])
SECONDS: Final = float(os.environ["LOADTEST_SECONDS"])
REQUESTS: Final = msgspec.json.decode(Path(os.environ["LOADTEST_REQUESTS"]).read_bytes(), type=list[Request])
OUT: Final = Path(os.environ["LOADTEST_OUT"])
#: A worker hears a little later than its master that it begins: it has run to the end if so much is left at most.
LEFT_S: Final = 1.0

recorder: Final = Recorder(SECONDS)


class Clock:
    """Seconds since the users began to come; 0 before."""

    def __init__(self) -> None:
        self._began: float | None = None

    def begin(self, **_: Any) -> None:
        self._began = time.monotonic()

    def now(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began


clock: Final = Clock()


class Ramp(LoadTestShape):
    """One user more every so many seconds."""

    def tick(self) -> tuple[int, float] | None:
        now = clock.now()
        if now >= SECONDS:
            return None
        return min(USERS, 1 + int(now / SECONDS * USERS)), float(USERS)


class Reader(FastHttpUser):
    """Reads images one after another, beginning anywhere."""

    wait_time = constant(0)
    host = "http://127.0.0.1"
    connection_timeout = network_timeout = 60.0
    _count = 0

    def on_start(self) -> None:
        Reader._count += 1
        self._at = Reader._count * 7919 % len(REQUESTS)  # a prime: users are spread over all of them

    @task
    def image(self) -> None:
        request = REQUESTS[self._at % len(REQUESTS)]
        self._at += 1
        due = clock.now()
        try:
            told = self._asked(request)
        except Exception as error:  # Locust itself would print it, and go on
            told = Answer(error=type(error).__name__)
        recorder.note(request.track, due, due, clock.now(), told)
        if told.error:
            time.sleep(0.01)  # a server that is away must not be asked in a loop that never rests

    def _asked(self, request: Request) -> Answer:
        with self.client.get(request.url, name=request.track, catch_response=True) as answer:
            nbytes = len(answer.content or b"")
            headers: Any = answer.headers or {}
            told = Answer(nbytes, headers.get("Voxcache-Tier", ""), server_timing(headers.get("Server-Timing", "")))
            if answer.status_code != 200:
                told = Answer(error=str(answer.status_code) if answer.status_code else "no answer")
            elif request.nbytes not in (-1, nbytes):
                told = Answer(error="wrong length")
            if told.error:
                answer.failure(told.error)
        return told


def write(environment: Any, **_: Any) -> None:
    """A worker's own file; it has none if it ended before the others."""
    if isinstance(environment.runner, WorkerRunner) and clock.now() >= SECONDS - LEFT_S:
        (OUT / f"{os.getpid()}.msgpack").write_bytes(msgspec.msgpack.encode(recorder.snapshot()))


events.test_start.add_listener(clock.begin)
events.test_stop.add_listener(write)
