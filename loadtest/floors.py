"""The least that each figure could be on this machine, measured in the same run: nothing can be faster than these.

memcpy          a copy of the tensor within a process, into memory that is in place
loopback send   the tensor over TCP to another process, by sendfile and by writes of 1 MiB: the better of the two
O_DIRECT        the tensor's bytes from the disk that the NVMe tier is on, one after another and 8 at a time
concurrent GET  all objects of the series from the bucket into memory, by obstore and by aiohttp, 16 to 64 at a time
codec alone     all its pixels decoded and rescaled from memory into one array, headers not even looked at
empty handler   a request to an HTTP handler in the daemon's framework that does nothing
pages           objects over HTTP from the memory of a server in the daemon's framework that does nothing else
"""

import asyncio
import contextlib
import functools
import http.client
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import numpy.typing as npt
import pydicom
import uvloop

from . import servers
from .peers.base import get_all
from .stand import MIB, Bucket, Series
from .tiers import direct

_WIDTHS: Final = (16, 32, 64)

Bytes = npt.NDArray[np.uint8]
Timed = Callable[[], float]


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _timed(work: Callable[..., Any], *arguments: Any) -> Timed:
    return lambda: seconds(functools.partial(work, *arguments))


def memcpy(content: Bytes) -> Timed:
    target = np.zeros_like(content)
    return lambda: seconds(lambda: np.copyto(target, content))


class Loopback:
    """Sends a file's bytes to this process from another one, and takes them into memory that is in place."""

    def __init__(self, path: Path) -> None:
        self._into = memoryview(bytearray(path.stat().st_size))
        self._path = path

    @contextlib.contextmanager
    def running(self) -> Iterator[dict[str, Timed]]:
        """Each way to send."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sender = servers.forked(functools.partial(self._send, listener))
            with socket.create_connection(listener.getsockname()) as connection:
                try:
                    yield {way: _timed(self._take, connection, way) for way in ("sendfile", "writes")}
                finally:
                    connection.close()
                    os.waitpid(sender, 0)

    def _take(self, connection: socket.socket, way: str) -> None:
        connection.sendall(way[:1].encode())
        at = 0
        while at < len(self._into):
            at += connection.recv_into(self._into[at:])

    def _send(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        listener.close()
        with self._path.open("rb") as file:
            content = memoryview(file.read())
            while asked := connection.recv(1):
                if asked == b"s":
                    connection.sendfile(file, 0, len(content))
                else:
                    for at in range(0, len(content), MIB):
                        connection.sendall(content[at : at + MIB])


def o_direct(path: Path, depth: int) -> Timed:
    """Of a file whose size is a multiple of 4 KiB, into pages that are in place."""
    nbytes = path.stat().st_size // 4096 * 4096
    pages = mmap.mmap(-1, nbytes)
    pages.write(bytes(nbytes))
    view = memoryview(pages)

    def read() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            direct(fd, 0, view, depth)
        finally:
            os.close(fd)

    return lambda: seconds(read)


def concurrent_get(bucket: Bucket, series: Series) -> dict[str, Timed]:
    """Each client at each width."""
    keys = sorted(series.files)
    store = bucket.store()

    async def by_aiohttp(width: int) -> float:
        connector = aiohttp.TCPConnector(limit=width)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20) as session:

            async def get(key: str) -> None:
                async with session.get(bucket.url(key)) as answer:
                    await answer.read()

            start = time.perf_counter()
            await asyncio.gather(*(get(key) for key in keys))
            return time.perf_counter() - start

    found: dict[str, Timed] = {f"obstore, {width} at a time": _timed(get_all, store, keys, width) for width in _WIDTHS}
    return found | {"aiohttp, 32 at a time": lambda: uvloop.run(by_aiohttp(32))}


def codec(series: Series) -> dict[str, Timed]:
    """Pixels that are stored as they are: where they begin is known, nothing else is read; by one thread and more."""
    objects = [series.files[key].read_bytes() for key in sorted(series.files)]
    head = pydicom.dcmread(series.files[sorted(series.files)[0]])
    count = head.Rows * head.Columns
    intercept = np.int16(head.RescaleIntercept)
    volume = np.zeros((len(objects), count), np.int16)

    def decode(number: int) -> None:
        # the pixel data is the last element of a phantom's file
        data = objects[number]
        np.add(np.frombuffer(data, np.int16, count, len(data) - 2 * count), intercept, out=volume[number])

    def all_of_them(threads: int) -> None:
        if threads == 1:
            for number in range(len(objects)):
                decode(number)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, range(len(objects))))

    cores = len(os.sched_getaffinity(0))
    return {f"{threads} threads": _timed(all_of_them, threads) for threads in sorted({1, cores})}


@contextlib.contextmanager
def empty_handler(place: Path) -> Iterator[str]:
    """The URL of a handler that reads a request and gives a small answer."""
    port = servers.free_port()
    command = [sys.executable, "-m", "loadtest.handoff", "--empty-handler", str(port)]
    with servers.process(command, place / "empty.log", servers.answers(port, "/readyz")):
        yield f"http://127.0.0.1:{port}/readyz"


@contextlib.contextmanager
def pages(place: Path, folder: Path) -> Iterator[servers.Server]:
    """A server that sends the files of ``folder`` from its memory."""
    port = servers.free_port()
    command = [sys.executable, "-m", "loadtest.pages", str(port), str(folder)]
    with servers.process(command, place / "pages.log", servers.answers(port, "/readyz")) as running:
        yield servers.Server(port, running.pid)


def round_trips(url: str, count: int) -> list[float]:
    """Seconds of small requests one after another over one connection."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    found = []
    for _ in range(count):
        start = time.perf_counter()
        connection.request("GET", place.path)
        connection.getresponse().read()
        found.append(time.perf_counter() - start)
    connection.close()
    return found
