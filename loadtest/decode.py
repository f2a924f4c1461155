"""How fast objects become values: each syntax beside its codec alone and plain pydicom, and whole series by workers.

    python -m loadtest.decode [--slices N]

Slices are 512 × 512 of 12 bits in 16, a synthetic chest CT. "Ours" decodes an object into its slice of a volume,
rescale included; "codec" is the decoder's own call on the same codestream. Of plain samples it is what has to be done
to them: inflate them, clear the unused bits, which may hold anything, and add the intercept; "floor" is the same for
all: the codec, and then these two passes over its samples. "pydicom" is its pixel data handling with the plugins it
recommends; GDCM's, which takes several threads for JPEG 2000, stands beside them where whole series are measured. All
take turns in one run; what one core does is counted in processor time, so that other work on the machine counts less.

Whole series: planned and decoded by worker processes, beside reading, decoding, rescaling and stacking in a loop. Then
the same series comes over a link that takes as long as decoding does: decoded when it is all there, and meanwhile.
"hidden" is the part of what could be saved that was: 1 where the whole takes no longer than the longer of both. And
once more as a stored pack, whose headers are read from its index: "second_recipe". The event loop that holds the pool
measures by how much it wakes up late at full load.

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/decode.json.
"""

import argparse
import asyncio
import io
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.pixels import apply_rescale, pixel_array
from pydicom.uid import UID

from cache.dicom.assemble import VolumeOptions, plan_volume
from cache.dicom.codecs import BIG_ENDIAN, DEFLATED, NATIVE_SYNTAXES, RLE, FrameFormat
from cache.dicom.decode import decode_slice
from cache.dicom.frames import frame_spans
from cache.dicom.header import read_header
from cache.dicom.phantom import write_series
from cache.interfaces import Extent
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.pack import Layout
from cache.recipe.chain import parse_recipe
from cache.workers.pool import Workers, WorkerSettings

from .encoders import JPEG_2000, JPEG_LOSSLESS_SYNTAXES, JPEG_LS, encode

RESULTS: Final = Path(__file__).resolve().parent / "results" / "decode.json"
EXPLICIT: Final = "1.2.840.10008.1.2.1"
HTJ2K: Final = "1.2.840.10008.1.2.4.201"
JPEG_LOSSLESS: Final = JPEG_LOSSLESS_SYNTAXES[1]
SINGLE: Final = (*NATIVE_SYNTAXES, RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000, HTJ2K)
PLUGINS: Final = {RLE: "pylibjpeg", JPEG_LS: "pyjpegls", JPEG_2000: "pylibjpeg", HTJ2K: "pylibjpeg"}
SLICE: Final = 512 * 512 * 2
TURNS: Final = 15

#: As many slices as take turns: more than a processor's cache holds, where that counts.
OBJECTS: Final = dict.fromkeys((*NATIVE_SYNTAXES, RLE), 60)

RECIPE: Final = parse_recipe("plain", {"version": 1, "ops": [{"op": "volume"}]}, ())

#: How many times a plain pydicom loop's speed a whole series must reach with two workers.
BARS: Final = {EXPLICIT: 2.0, JPEG_LS: 2.0, JPEG_2000: 1.8, HTJ2K: 4.0}

Array = npt.NDArray[Any]
T = TypeVar("T")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def name(syntax: str) -> str:
    return str(UID(syntax).name).split(" (")[0]


# ------------------------------------------------------------------ one object, one core


def objects(folder: Path, syntax: str, slices: int) -> list[bytes]:
    """The phantom in ``syntax``; those that it does not come in are encoded from plain ones."""
    if syntax != JPEG_LOSSLESS:
        return [path.read_bytes() for path in write_series(folder, slices=slices, transfer_syntax=syntax)[2]]
    made = []
    for path in write_series(folder, slices=slices)[2]:
        ds = pydicom.dcmread(path)
        fmt = FrameFormat(syntax, ds.Rows, ds.Columns, 1, "MONOCHROME2", 0, 16, 12, signed=False)
        ds.PixelData = pydicom.encaps.encapsulate([encode(ds.pixel_array, fmt)[0]])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        made.append(buffer.getvalue())
    return made


def codec_alone(syntax: str, value: memoryview, into: Array) -> Callable[[], object]:
    """The work that cannot be done without: the decoder's call; of plain samples, what each needs done to it."""
    decoders: dict[str, Callable[[], object]] = {
        RLE: lambda: imagecodecs.dicomrle_decode(value, np.dtype("<u2")),
        JPEG_LOSSLESS: lambda: imagecodecs.jpeg8_decode(value),
        JPEG_LS: lambda: imagecodecs.jpegls_decode(value),
        JPEG_2000: lambda: imagecodecs.jpeg2k_decode(value),
        HTJ2K: lambda: imagecodecs.htj2k_decode(value),
    }
    if syntax in decoders:
        return decoders[syntax]

    def plain() -> None:
        data = zlib.decompress(value, -zlib.MAX_WBITS)[-SLICE:] if syntax == DEFLATED else value
        np.bitwise_and(np.frombuffer(data, ">i2" if syntax == BIG_ENDIAN else "<i2").reshape(512, 512), 4095, out=into)
        np.add(into, np.int16(-1024), out=into)

    return plain


def single(folder: Path) -> dict[str, dict[str, float]]:
    """Decoded MB a second of one core's time, by syntax and way: the median over turns."""
    found = {}
    for syntax in SINGLE:
        data = objects(folder / syntax, syntax, OBJECTS.get(syntax, 6))
        views = [memoryview(each) for each in data]
        headers = [read_header(view, member) for member, view in enumerate(views)]
        plan = plan_volume(headers, VolumeOptions())
        volume, other = (np.empty(plan.spec.shape, plan.spec.dtype) for _ in range(2))
        ways: dict[str, list[Callable[[], object]]] = {"ours": [], "codec": [], "floor": [], "pydicom": []}
        for piece in plan.slices:
            view, header = views[plan.objects[piece.object].member], plan.objects[piece.object]
            ds = pydicom.dcmread(io.BytesIO(view))
            if syntax == DEFLATED:
                value = view[132 + 12 + ds.file_meta.FileMetaInformationGroupLength :]
                ways["pydicom"].append(partial(read_again, view))
            else:
                index = frame_spans(view, header.pixel_offset, header.pixel_nbytes, header.format, 1)
                value = index.frame(view, 0)
                ways["pydicom"].append(partial(pixel_array, ds, decoding_plugin=PLUGINS.get(syntax, "")))
            ways["ours"].append(partial(decode_slice, view, header, piece, volume[piece.at]))
            codec = codec_alone(syntax, value, other[piece.at])
            ways["codec"].append(codec)
            ways["floor"].append(
                codec if syntax in NATIVE_SYNTAXES else partial(with_passes, codec, syntax, other[piece.at])
            )
        found[syntax] = {way: SLICE / seconds / 1e6 for way, seconds in in_turns(ways).items()}
        for other_way in ("codec", "floor"):
            found[syntax][f"share_of_{other_way}"] = found[syntax]["ours"] / found[syntax][other_way]
        say(f"{name(syntax):45} " + "  ".join(f"{way} {rate:8.2f}" for way, rate in found[syntax].items()))
    return found


def with_passes(codec: Callable[[], Any], syntax: str, into: Array) -> None:
    """Decode, clear the unused bits, add the intercept."""
    decoded = codec()
    samples = np.frombuffer(decoded, np.int16).reshape(512, 512) if syntax == RLE else decoded.view(np.int16)
    np.bitwise_and(samples, 4095, out=into)
    np.add(into, np.int16(-1024), out=into)


def read_again(view: memoryview) -> Array:
    """Of a deflated object pydicom keeps what it inflated, so inflating counts as reading."""
    array: Array = pixel_array(pydicom.dcmread(io.BytesIO(view)))
    return array


def in_turns(ways: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """Processor seconds a slice takes: the median of turns, each of which takes all slices once or more."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(TURNS + 1):
        for way, calls in ways.items():
            began, rounds = time.process_time(), 0
            while rounds == 0 or time.process_time() - began < 0.02:
                for call in calls:
                    call()
                rounds += 1
            if turn:  # the first one warms up
                seconds[way].append((time.process_time() - began) / rounds / len(calls))
    return {way: statistics.median(each) for way, each in seconds.items()}


# ------------------------------------------------------------------ whole series, workers


class Series:
    """A series as it lies in the arena: its objects in one extent, room for the volume in another."""

    def __init__(self, folder: Path, paths: list[Path]) -> None:
        self.paths = paths
        self.data = [path.read_bytes() for path in paths]
        sources = [SourceObject(f"{n:04d}", len(each), "etag") for n, each in enumerate(self.data)]
        self.layout = Layout.of(Manifest.of(SeriesRef("1.2", "1.3"), sources))
        self.arena = folder / "arena"
        nbytes = -(-self.layout.nbytes // 4096) * 4096
        volume = SLICE * len(paths)
        with self.arena.open("w+b") as file:
            file.write(b"\0" * (nbytes + volume))  # the daemon's arena is there before the first request
            self.bytes = memoryview(mmap.mmap(file.fileno(), nbytes + volume))
        for member in range(len(paths)):
            self.bring(member)
        self.pack = Extent(str(self.arena), 0, self.layout.nbytes)
        self.room = Extent(str(self.arena), nbytes, volume)

    def bring(self, number: int) -> None:
        member = self.layout.members[number]
        self.bytes[member.offset : member.offset + member.nbytes] = self.data[number]

    async def through(self, workers: Workers, stored: bool = False) -> dict[str, float]:
        """Seconds that planning and decoding take when all objects are there; of a stored pack, by its index."""
        began = time.perf_counter()
        async with workers.derivation(self.pack, self.layout, RECIPE, lambda _: None, stored) as derivation:
            for member in range(0 if stored else len(self.paths)):
                derivation.arrived(member)
            await derivation.plan()
            inspected = time.perf_counter()
            await derivation.derive(self.pack, self.room, None)
            ended = time.perf_counter()
        return {"inspect": inspected - began, "decode": ended - inspected, "total": ended - began}

    async def arriving(self, rate: float, arrived: Callable[[int], None]) -> None:
        """Objects as a link brings them that carries ``rate`` bytes a second: its pace, without a network's noise."""
        due = time.perf_counter()
        for number, data in enumerate(self.data):
            due += len(data) / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.bring(number)
            arrived(number)

    async def fetched(self, workers: Workers, rate: float, meanwhile: bool) -> float:
        """Seconds from the first byte to the volume, decoded when all objects are there, or as they arrive."""
        here: list[int] = []
        began = time.perf_counter()
        if not meanwhile:
            await self.arriving(rate, here.append)
        async with workers.derivation(
            self.pack, self.layout, RECIPE, lambda _: self.room if meanwhile else None
        ) as derivation:
            for number in here:
                derivation.arrived(number)
            if meanwhile:
                await self.arriving(rate, derivation.arrived)
            await derivation.plan()
            await derivation.derive(self.pack, self.room, None)
        return time.perf_counter() - began

    def volume(self) -> Array:
        return np.fromfile(self.arena, np.int16, offset=self.room.offset).reshape(-1, 512, 512)

    def plain(self, plugin: str) -> tuple[float, Array]:
        """What most code does: read, decode, rescale, sort and stack."""
        began = time.perf_counter()
        slices = []
        for path in self.paths:
            ds = pydicom.dcmread(path)
            ds.pixel_array_options(decoding_plugin=plugin)
            values = apply_rescale(ds.pixel_array, ds).astype(np.int16)
            slices.append((float(ds.ImagePositionPatient[2]), values))
        slices.sort(key=lambda each: each[0], reverse=True)  # rows, columns and slices as ours: a right-handed frame
        stack = np.stack([values for _, values in slices])
        return time.perf_counter() - began, stack


async def watched(work: Coroutine[Any, Any, T]) -> tuple[T, list[float]]:
    """What ``work`` gives, and by how much the loop woke late meanwhile."""
    stop = asyncio.Event()
    watch = asyncio.create_task(lateness(stop))
    try:
        done = await work
    finally:
        stop.set()
    return done, await watch


async def lateness(stop: asyncio.Event) -> list[float]:
    """By how much the loop wakes later than a millisecond, again and again."""
    late = []
    while not stop.is_set():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - began - 0.001)
    return late


async def series(folder: Path, slices: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    two, one = Workers(WorkerSettings(count=2)), Workers(WorkerSettings(count=1))
    await two.start()
    await one.start()
    try:
        for syntax in (EXPLICIT, RLE, JPEG_LS, JPEG_2000, HTJ2K):
            place = folder / f"series{syntax}"
            paths = write_series(place, slices=slices, transfer_syntax=syntax)[2]
            found[syntax] = await measured(Series(place, paths), syntax, one, two)
            say(f"{name(syntax):45} " + "  ".join(f"{key} {value:.3f}" for key, value in found[syntax].items()))
            for path in paths:
                path.unlink()
            (place / "arena").unlink()
    finally:
        await one.close()
        await two.close()
    return found


async def measured(whole: Series, syntax: str, one: Workers, two: Workers) -> dict[str, float]:
    """Seconds of each way, the best of the rounds: other work on the machine only ever adds."""
    ways: dict[str, list[float]] = {}
    late: list[float] = []

    def took(way: str, seconds: float) -> None:
        ways.setdefault(f"{way}_s", []).append(seconds)

    for each in (one, two):
        await whole.through(each)  # workers load a decoder when they first need it
    for _ in range(2 if syntax == JPEG_2000 else 4):
        by_two, gaps = await watched(whole.through(two))
        late += gaps
        by_one = await whole.through(one)
        for part, seconds in by_two.items():
            took(f"two_{part}", seconds)
        for part, seconds in by_one.items():
            took(f"one_{part}", seconds)
        seconds, stack = whole.plain(PLUGINS.get(syntax, ""))
        took("pydicom", seconds)
        if not np.array_equal(stack, whole.volume()):
            raise AssertionError("the two volumes differ")
    if syntax == JPEG_2000:
        took("pydicom_gdcm", whole.plain("gdcm")[0])
    # a link that takes as long as decoding does: there is no more to hide, and no less
    rate = sum(map(len, whole.data)) / statistics.median(ways["two_total_s"])
    arriving_late: list[float] = []
    for _ in range(2 if syntax == JPEG_2000 else 4):
        took("fetched_then_decoded", await whole.fetched(two, rate, meanwhile=False))
        seconds, gaps = await watched(whole.fetched(two, rate, meanwhile=True))
        arriving_late += gaps
        took("decoded_meanwhile", seconds)
        if not np.array_equal(stack, whole.volume()):
            raise AssertionError("the two volumes differ")
        began = time.perf_counter()
        await whole.arriving(rate, lambda _: None)
        took("fetch_alone", time.perf_counter() - began)
        took("second_recipe", (await whole.through(two, stored=True))["total"])
    best = {way: min(seconds) for way, seconds in ways.items()}
    return best | {
        "times_pydicom": best["pydicom_s"] / best["two_total_s"],
        "two_over_one": best["one_decode_s"] / best["two_decode_s"],
        "hidden": (best["fetched_then_decoded_s"] - best["decoded_meanwhile_s"])
        / (best["fetched_then_decoded_s"] - max(best["fetch_alone_s"], best["two_total_s"])),
        "arriving_gap_max_ms": max(arriving_late) * 1e3,
        "loop_gap_max_ms": max(late) * 1e3,
        "loop_gap_p99_ms": sorted(late)[len(late) * 99 // 100] * 1e3,
    }


def bar(what: str, value: float, limit: float, least: bool = True, **more: float) -> dict[str, Any]:
    ok = value >= limit if least else value < limit
    return {"name": what, "value": round(value, 3), "bar": limit, "ok": ok} | {k: round(v, 3) for k, v in more.items()}


def share_bar(syntax: str, rates: dict[str, float]) -> dict[str, Any]:
    """``floor``: the share that is left to whoever does the codec's work and the two passes, and nothing else."""
    floor = rates["floor"] / rates["codec"]
    return bar(f"share_of_codec {name(syntax)}", rates["share_of_codec"], 0.9, floor=floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    slices = parser.parse_args().slices
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="voxcache-decode-") as folder:
        alone = single(Path(folder))
        whole = asyncio.run(series(Path(folder), slices))
    bars = [share_bar(syntax, rates) for syntax, rates in alone.items()]
    bars += [bar(f"times_pydicom {name(syntax)}", whole[syntax]["times_pydicom"], BARS[syntax]) for syntax in BARS]
    bars += [bar(f"two_over_one {name(syntax)}", each["two_over_one"], 1.8) for syntax, each in whole.items()]
    bars.append(bar("loop_gap_max_ms JPEG 2000", whole[JPEG_2000]["loop_gap_max_ms"], 20, least=False))
    bars.append(bar("arriving_gap_max_ms JPEG 2000", whole[JPEG_2000]["arriving_gap_max_ms"], 20, least=False))
    bars += [bar(f"hidden {name(syntax)}", each["hidden"], 0.8) for syntax, each in whole.items()]
    machine: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "slices": slices,
    }
    machine["load_average"] = os.getloadavg()  # two busy workers and this process make 2; more was somebody else
    figures = {"machine": machine, "single_MB_per_s": alone, "series": whole, "bars": bars}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
