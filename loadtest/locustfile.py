"""What Locust's users do in `loadtest.scenarios.ramp`: images, one after another, as fast as they come.

Their number grows evenly from 1 to ``LOADTEST_USERS`` in ``LOADTEST_SECONDS``. Latencies go to a file of HDR histograms
(`loadtest.measures`), because Locust itself rounds them. ``LOADTEST_REQUESTS``: the requests, as JSON.
"""

import os
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from locust import LoadTestShape, constant, events, task
from locust.contrib.fasthttp import FastHttpUser

from loadtest.generator import Request
from loadtest.measures import Answer, Recorder, server_timing

USERS: Final = int(os.environ["LOADTEST_USERS"])
SECONDS: Final = float(os.environ["LOADTEST_SECONDS"])
REQUESTS: Final = msgspec.json.decode(Path(os.environ["LOADTEST_REQUESTS"]).read_bytes(), type=list[Request])
OUT: Final = Path(os.environ["LOADTEST_OUT"])

recorder: Final = Recorder(SECONDS)


class Ramp(LoadTestShape):
    """One user more every so many seconds."""

    def tick(self) -> tuple[int, float] | None:
        if not self.get_current_user_count():  # type: ignore[no-untyped-call]
            self.reset_time()  # type: ignore[no-untyped-call]  # seconds count from the first user on
        now = float(self.get_run_time())  # type: ignore[no-untyped-call]
        if now >= SECONDS:
            return None
        return min(USERS, 1 + int(now / SECONDS * USERS)), float(USERS)


class Reader(FastHttpUser):
    """Reads images one after another, beginning anywhere."""

    wait_time = constant(0)
    host = "http://127.0.0.1"
    connection_timeout = network_timeout = 60.0
    began = 0.0
    _count = 0

    def on_start(self) -> None:
        Reader._count += 1
        Reader.began = Reader.began or time.monotonic()
        self._at = Reader._count * 7919 % len(REQUESTS)  # a prime: users are spread over all of them

    @task
    def image(self) -> None:
        request = REQUESTS[self._at % len(REQUESTS)]
        self._at += 1
        due = time.monotonic() - Reader.began
        with self.client.get(request.url, name=request.track, catch_response=True) as answer:
            nbytes = len(answer.content or b"")
            headers: Any = answer.headers or {}
            told = Answer(nbytes, headers.get("Voxcache-Tier", ""), server_timing(headers.get("Server-Timing", "")))
            if answer.status_code != 200:
                told = Answer(error=str(answer.status_code) if answer.status_code else "no answer")
            elif request.nbytes not in (-1, nbytes):
                told = Answer(error="wrong length")
            recorder.note(request.track, due, due, time.monotonic() - Reader.began, told)
            if told.error:
                answer.failure(told.error)
                time.sleep(0.01)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def write(environment: Any, **_: Any) -> None:
    """Each process its own file."""
    (OUT / f"{os.getpid()}.msgpack").write_bytes(msgspec.msgpack.encode(recorder.snapshot()))
