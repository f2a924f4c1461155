"""``voxcache demo``: one study's way to a model's answer, without voxcache and with it, side by side."""

import argparse
import contextlib
import functools
import json
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import tritonclient.http

from cache.dicom.phantom import write_series
from cache.errors import VoxcacheError
from cache.recipe.chain import parse_recipe

from . import direct
from .daemon import DaemonError, DaemonProcess
from .tritonserver import TritonServer, TritonServerError

RECIPE: Final = "ct_small"
#: p50 of a RAM hit by reference has to be this many times below the way without voxcache.
BAR: Final = 50

_Answer = dict[str, np.ndarray]


class _Series(NamedTuple):
    study: str
    series: str
    files: list[Path]


_OPS: Final = """\
  { op = "volume" },
  { op = "resample", spacing = [2.5, 2.5, 2.5] },
  { op = "crop_pad", shape = [128, 128, 128], fill = -1024 },
  { op = "cast", dtype = "float32" },"""
_RECIPE_TOML: Final = f"""
[recipes.ct_small]
version = 1
ops = [
{_OPS}
]

[recipes.ct_embedding]
version = 1
ops = [
{_OPS}
  {{ op = "infer", model = "embed", output = "EMBEDDING" }},
]
"""

_SETTINGS: Final = """
[server]
port = 0

[ram]
budget = "2 GiB"

[nvme]
path = "{work}/nvme"
budget = "4 GiB"

[state]
path = "{work}/state"

[origin.directory]
path = "{work}/bucket"

[triton]
url = "{triton}"

[triton.models.embed]
recipe = "ct_small"

[triton.models.measure]
recipe = "ct_small"

[arrivals]
warm = ["ct_embedding"]
quiet_s = 0.5

[log]
format = "console"
"""


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 if every way gave the same answer and the RAM hit is as fast as promised."""
    work = Path(tempfile.mkdtemp(prefix="voxcache-demo-"))
    with contextlib.ExitStack() as stack:
        if not arguments.keep:
            stack.callback(shutil.rmtree, work, ignore_errors=True)
        try:
            report = _demo(arguments, work, stack)
        except (TritonServerError, DaemonError) as error:
            raise VoxcacheError(str(error)) from error
        _show(report)
        if arguments.json:
            print(json.dumps(report))
        return 0 if all(bar["ok"] for bar in report["bars"]) else 1


def _until(daemon: DaemonProcess, study: str, kind: str, tier: str) -> None:
    """Wait until the tier holds an entry of this kind of the study."""
    end = time.monotonic() + 120
    while all((e["kind"], e["tier"]) != (kind, tier) for e in daemon.call("GET", f"/v1/studies/{study}")["entries"]):
        if time.monotonic() > end:
            raise DaemonError(f"study {study} did not become ready:\n{daemon.log()}")
        time.sleep(0.02)


def _evict(daemon: DaemonProcess, study: str) -> None:
    """Forget the study, once what is being written behind has been written."""
    while daemon.call("GET", f"/v1/studies/{study}")["entries"]:
        daemon.call("DELETE", f"/v1/studies/{study}")


def _demo(arguments: argparse.Namespace, work: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    _say(f"writing two synthetic CT series of {arguments.slices} slices")
    made = []
    for number in (1, 2):
        study = f"2.25.{number}"
        written = write_series(
            work / "bucket",
            slices=arguments.slices,
            transfer_syntax=arguments.transfer_syntax,
            study_uid=study,
            series_uid=f"{study}.1",
        )
        made.append(_Series(*written))
    _say("starting Triton and the daemon")
    triton = TritonServer(work / "triton.log")
    triton.start()
    settings = work / "voxcache.toml"
    settings.write_text(_SETTINGS.format(work=work, triton=triton.url) + _RECIPE_TOML)
    daemon = DaemonProcess(settings, work / "voxcache.log")
    if not arguments.keep:
        stack.callback(triton.stop)
        stack.callback(daemon.stop)
    daemon.start()
    report = _measure(made[0], made[1], triton, daemon, work / "bucket")
    if arguments.keep:
        _say(f"left running: daemon {daemon.url} (pid {daemon.pid}), Triton {triton.url} (pid {triton.pid})")
        _say(f"look at {daemon.url}/v1/studies/{made[0].study}, {daemon.url}/metrics and {daemon.url}/openapi.json")
        _say(f"the files and logs are in {work}; end it with: kill {daemon.pid} {triton.pid}; rm -r {work}")
    return report


def _measure(
    asked: _Series, announced: _Series, triton: TritonServer, daemon: DaemonProcess, bucket: Path
) -> dict[str, Any]:
    embedded: list[_Answer] = []
    measured: list[_Answer] = []

    _say("the way without voxcache: fetch, decode, prepare, send the bytes to Triton")
    recipe = parse_recipe(RECIPE, tomllib.loads(_RECIPE_TOML)["recipes"][RECIPE])
    with contextlib.closing(tritonclient.http.InferenceServerClient(triton.url.removeprefix("http://"))) as client:

        def prepared() -> np.ndarray:
            return direct.prepare(*direct.decode(direct.read(asked.files[0].parent)), recipe)

        without = _timed(lambda: direct.infer(client, "embed", prepared()), 5, embedded)
        tensor = prepared()
        measured.append(direct.infer(client, "measure", tensor))

    with _references(daemon) as ask:
        _say("the first miss")
        miss = _timed(lambda: ask("embed", asked), 3, embedded, before=lambda: _evict(daemon, asked.study))
        _say("RAM hits")
        ram_hit = _timed(lambda: ask("embed", asked), 300, embedded)
        measured.append(ask("measure", asked))

    _say("NVMe hits, each after a restart of the daemon")
    _until(daemon, asked.study, "tensor", "nvme")
    hits = []
    for _ in range(3):
        daemon.stop()
        daemon.start()
        with _references(daemon) as ask:
            hits.append(_timed_once(functools.partial(ask, "embed", asked), embedded))

    _say("a study that is announced, and warmed before anybody asks for it")
    start = time.perf_counter()
    daemon.call("POST", "/v1/arrivals/s3", {"Records": [_record(path, bucket) for path in announced.files]})
    _until(daemon, announced.study, "embedding", "ram")
    arrival_to_ready_s = time.perf_counter() - start
    with _references(daemon) as ask:
        warmed_hit = _timed(lambda: ask("embed", announced), 300, embedded)
        measured.append(ask("measure", announced))

    _say("the study most like it")
    for each in (asked, announced):
        found = daemon.call("POST", "/v1/embeddings/query", {"like": f"{each.study}/{each.series}/ct_embedding"})

    same = _all_same(embedded) and _all_same(measured)
    speedup = round(without["p50_ms"] / ram_hit["p50_ms"], 1)
    return {
        "direct": without,
        "miss": miss,
        "ram_hit": ram_hit,
        "nvme_hit": _percentiles(hits),
        "warmed_hit": warmed_hit,
        "slices": len(asked.files),
        "source_bytes": sum(path.stat().st_size for path in asked.files),
        "tensor_bytes": int(tensor.nbytes),
        "arrival_to_ready_s": round(arrival_to_ready_s, 2),
        "nearest": found["neighbours"],
        "speedup_ram_vs_direct": speedup,
        "same_answer": same,
        "bars": [
            {"name": "speedup_ram_vs_direct", "value": speedup, "bar": BAR, "ok": speedup >= BAR},
            {"name": "same_answer", "value": same, "bar": True, "ok": same},
        ],
    }


@contextlib.contextmanager
def _references(daemon: DaemonProcess) -> Iterator[Callable[[str, _Series], _Answer]]:
    """Inference by reference, through an unchanged Triton client."""
    with contextlib.closing(tritonclient.http.InferenceServerClient(daemon.url.removeprefix("http://"))) as client:

        def ask(model: str, of: _Series) -> _Answer:
            reference = tritonclient.http.InferInput("REFERENCE", [1], "BYTES")
            reference.set_data_from_numpy(np.array([f"{of.study}/{of.series}/{RECIPE}".encode()], dtype=object))
            return direct.outputs(client.infer(f"{model}.ref", [reference]))

        yield ask


def _timed(
    call: Callable[[], _Answer],
    times: int,
    answers: list[_Answer],
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    took = []
    for _ in range(times):
        before()
        took.append(_timed_once(call, answers))
    return _percentiles(took)


def _timed_once(call: Callable[[], _Answer], answers: list[_Answer]) -> float:
    start = time.perf_counter()
    answers.append(call())
    return (time.perf_counter() - start) * 1e3


def _percentiles(ms: list[float]) -> dict[str, Any]:
    p50, p99 = (round(float(p), 3) for p in np.percentile(ms, (50, 99)))
    return {"p50_ms": p50, "p99_ms": p99, "n": len(ms)}


def _all_same(answers: list[_Answer]) -> bool:
    return all(
        answer.keys() == answers[0].keys() and all(np.array_equal(answer[name], answers[0][name]) for name in answer)
        for answer in answers
    )


def _record(path: Path, bucket: Path) -> dict[str, Any]:
    """One record of an S3 notification, as Ceph's gateway writes it."""
    key, size = path.relative_to(bucket).as_posix(), path.stat().st_size
    return {
        "eventSource": "ceph:s3",
        "eventName": "ObjectCreated:Put",
        "eventTime": "2026-01-01T00:00:00Z",
        "s3": {"bucket": {"name": "demo"}, "object": {"key": key, "size": size, "eTag": "", "sequencer": "0"}},
    }


def _show(report: dict[str, Any]) -> None:
    ways = {
        "direct": "without voxcache",
        "miss": "first miss",
        "nvme_hit": "NVMe hit, after a restart",
        "ram_hit": "RAM hit",
        "warmed_hit": "hit, warmed by its arrival",
    }
    size = report["source_bytes"] / 1e6
    print(f"\nOne CT study of {report['slices']} slices ({size:.0f} MB), to an embedding out of Triton\n")
    print(f"{'':28}{'p50 ms':>10}{'p99 ms':>10}{'n':>6}{'times faster':>15}")
    for name, told in ways.items():
        row = report[name]
        faster = report["direct"]["p50_ms"] / row["p50_ms"]
        print(f"{told:28}{row['p50_ms']:>10.2f}{row['p99_ms']:>10.2f}{row['n']:>6}{faster:>14.1f}×")
    print(f"\nfrom the arrival to a warm cache: {report['arrival_to_ready_s']:.1f} s")
    for near in report["nearest"]:
        print(f"most like it, by its embedding: study {near['study']}, cosine {near['score']:.3f}")
    print(f"all ways gave the same answer: {'yes' if report['same_answer'] else 'NO'}\n", flush=True)


def _say(text: str) -> None:
    print(f"· {text}", file=sys.stderr, flush=True)
