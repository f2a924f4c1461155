"""What a peer is, and how those that hold objects are read."""

import asyncio
import contextlib
import http.client
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import obstore
import pydicom
from obstore.store import HTTPStore, S3Store

from loadtest.generator import Request
from loadtest.stand import Bucket, Series

#: Objects that a caller asks for at the same time.
AT_ONCE: Final = 32

Tensor = npt.NDArray[np.int16]


class Peer(ABC):
    """One of those who are compared. ``limit``: bytes that it may use, of RAM or of disk as is its way."""

    name: ClassVar[str]
    #: How it is set, in words: it goes into the report.
    settings: ClassVar[str]
    #: Whether it hands over the tensor itself: nothing is left to decode.
    ready: ClassVar[bool] = False
    #: Objects that one caller asks for at the same time.
    at_once: int = AT_ONCE

    def __init__(self, place: Path, bucket: Bucket, limit: int) -> None:
        self.place = place
        self.bucket = bucket
        self.limit = limit
        self.pid = 0
        place.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def start(self, stack: contextlib.ExitStack) -> None:
        """Begin; ``stack`` ends it. Raises: RuntimeError: it cannot."""

    def load(self, series: Series) -> None:  # noqa: B027 - most need nothing
        """What has to be done once before a series can be asked for; it is in no figure."""

    @abstractmethod
    def tensor(self, series: Series) -> Tensor:
        """The tensor, from wherever the peer has it by now; the first time it has nothing."""

    def requests(self, series: Series) -> list[Request]:
        """GETs of the series' objects, for who serves them over HTTP."""
        return []

    def disk(self) -> Path | None:
        """Where it keeps what it has on disk."""
        return None


def expected(series: Series) -> Tensor:
    """The tensor that every peer must hand over, from the files that went into the bucket."""
    return volume_of([path.read_bytes() for path in series.files.values()])


def check(tensor: Tensor, right: Tensor) -> None:
    """Raises: AssertionError: it is not the tensor that the objects have."""
    assert (tensor.shape, tensor.dtype) == (right.shape, right.dtype), f"{tensor.dtype} of {tensor.shape}"
    # eight bytes at a time: it is done after every hit
    same = np.array_equal(tensor.reshape(-1).view(np.uint64), right.reshape(-1).view(np.uint64))
    assert same, "another tensor than the objects have"


def volume_of(objects: Sequence[Any]) -> Tensor:
    """A plain pydicom loop: parse, sort from the head down, rescale (slope 1), into one array."""
    slices = [pydicom.dcmread(io.BytesIO(data)) for data in objects]
    slices.sort(key=lambda each: float(each.ImagePositionPatient[2]), reverse=True)
    volume = np.empty((len(slices), slices[0].Rows, slices[0].Columns), np.int16)
    for number, each in enumerate(slices):
        volume[number] = each.pixel_array
        volume[number] += np.int16(each.RescaleIntercept)
    return volume


def get_all(store: S3Store | HTTPStore, keys: Sequence[str], at_once: int = AT_ONCE) -> list[Any]:
    """The objects' bytes, ``at_once`` at a time."""

    async def all_of_them() -> list[Any]:
        slots = asyncio.Semaphore(at_once)

        async def get(key: str) -> Any:
            async with slots:
                return await (await obstore.get_async(store, key)).bytes_async()

        return await asyncio.gather(*(get(key) for key in keys))

    return asyncio.run(all_of_them())


def get_one(connection: http.client.HTTPConnection, path: str) -> bytes:
    """One large body, as urllib and requests read it. Raises: RuntimeError: another status than 200."""
    connection.request("GET", path)
    answer = connection.getresponse()
    told = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status}")
    return told


def over_http(base: str) -> HTTPStore:
    """obstore's client of any HTTP server. To make one takes long (it reads all of the system's certificates)."""
    return HTTPStore.from_url(
        base, client_options={"allow_http": True, "timeout": "120s"}, retry_config={"max_retries": 0}
    )


def read_all(paths: Sequence[Path], at_once: int = AT_ONCE) -> list[bytes]:
    """The files' bytes, ``at_once`` at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(Path.read_bytes, paths))
