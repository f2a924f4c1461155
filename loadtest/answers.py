"""What an answer costs that a model has given before: kept by the daemon, beside Triton's own response cache.

One real Triton with its response cache on, one daemon before it, both asked for the same embedding of the same volume,
in turn. To Triton the volume goes as bytes, or by a shared-memory region of the client's; to the daemon goes a
reference. Nothing runs the model: every answer but the first is a hit. The floor is a request to the daemon that does
nothing (server liveness, answered behind the same door).

    python -m loadtest.answers [--sizes 1,32,128] [--rounds N]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/answers.json.
"""

import argparse
import contextlib
import json
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import shared_memory

from cache.dicom.phantom import write_series
from serving.demo.daemon import DaemonProcess
from serving.demo.tritonserver import MODELS, TritonServer, free_ports

from .figures import at_least, plain, say, summary
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "answers.json"
MIB: Final = 1 << 20
ROUNDS: Final = {1: 200, 32: 40, 128: 15}
#: How many times longer Triton's best hit takes, at the largest size.
BAR, LEAST = "triton_region_over_kept_grpc_at_the_largest", 10.0

_SETTINGS: Final = """
[server]
port = 0
[grpc]
port = {port}
[ram]
budget = {ram}
[nvme]
path = "{work}/nvme"
budget = {nvme}
[state]
path = "{work}/state"
[origin.directory]
path = "{work}/bucket"
[store]
revalidate = "events"
[triton]
url = "{triton.url}"
grpc = "{triton.grpc_url}"
[triton.models.embed]
recipe = "volume"
results = true
[recipes.volume]
version = 1
ops = [{{ op = "volume" }}, {{ op = "cast", dtype = "float32" }}]
"""

Ask = Callable[[], npt.NDArray[Any]]


def by_reference(module: Any, client: Any, text: str) -> Ask:
    reference = module.InferInput("REFERENCE", [1], "BYTES")
    reference.set_data_from_numpy(np.array([text.encode()], object))
    return lambda: client.infer("embed.ref", [reference]).as_numpy("EMBEDDING")


def by_bytes(module: Any, client: Any, volume: npt.NDArray[np.float32]) -> Ask:
    def ask() -> npt.NDArray[Any]:
        given = module.InferInput("VOLUME", list(volume.shape), "FP32")
        given.set_data_from_numpy(volume)
        found: npt.NDArray[Any] = client.infer("embed", [given]).as_numpy("EMBEDDING")
        return found

    return ask


def by_region(client: Any, volume: npt.NDArray[np.float32], undo: contextlib.ExitStack) -> Ask:
    name = f"voxcache-bench-{secrets.token_hex(4)}"
    region = shared_memory.create_shared_memory_region(name, f"/{name}", volume.nbytes)
    undo.callback(shared_memory.destroy_shared_memory_region, region)
    shared_memory.set_shared_memory_region(region, [volume])
    client.register_system_shared_memory(name, f"/{name}", volume.nbytes)
    undo.callback(client.unregister_system_shared_memory, name)
    given = tritonclient.grpc.InferInput("VOLUME", list(volume.shape), "FP32")
    given.set_shared_memory(name, volume.nbytes)
    return lambda: client.infer("embed", [given]).as_numpy("EMBEDDING")


class Setting(NamedTuple):
    """The servers, the daemon's gRPC address, and its bucket."""

    daemon: DaemonProcess
    door: str
    triton: TritonServer
    bucket: Path


def measured(setting: Setting, size: int, rounds: int) -> dict[str, Any]:
    daemon, door, triton, bucket = setting
    study, series, _ = write_series(bucket, slices=size, rows=512, columns=512)
    reference = f"{study}/{series}"
    with contextlib.ExitStack() as undo:

        def opened(module: Any, url: str) -> Any:
            client = module.InferenceServerClient(url)
            undo.callback(client.close)
            return client

        ours = opened(tritonclient.http, daemon.url.removeprefix("http://")), opened(tritonclient.grpc, door)
        theirs = (
            opened(tritonclient.http, triton.url.removeprefix("http://")),
            opened(tritonclient.grpc, triton.grpc_url),
        )
        with tritonclient.http.InferenceServerClient(daemon.url.removeprefix("http://")) as client:
            by_reference(tritonclient.http, client, reference)()
        told = daemon.call("POST", "/v1/leases", {"study": study, "series": series, "recipe": "volume"})
        shape, nbytes = told["shape"], told["nbytes"]
        volume = np.fromfile(f"/dev/shm/{told['shm']}", np.float32, nbytes // 4, offset=told["offset"]).reshape(shape)
        daemon.call("DELETE", f"/v1/leases/{told['lease']}")
        ways: dict[str, Callable[[], Any]] = {
            "kept_http": by_reference(tritonclient.http, ours[0], reference),
            "kept_grpc": by_reference(tritonclient.grpc, ours[1], reference),
            "triton_bytes_http": by_bytes(tritonclient.http, theirs[0], volume),
            "triton_bytes_grpc": by_bytes(tritonclient.grpc, theirs[1], volume),
            "triton_region_grpc": by_region(theirs[1], volume, undo),
        }
        answers = [ask().tobytes() for ask in ways.values()]
        assert len(set(answers)) == 1, "all ways give the same answer"
        _until_kept(daemon, study, 2)
        ran = _runs(theirs[1])
        ways |= {"floor_http": ours[0].is_server_live, "floor_grpc": ours[1].is_server_live}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, ask in ways.items():
                start = time.perf_counter()
                ask()
                took[name].append(time.perf_counter() - start)
        assert _runs(theirs[1]) == ran, "nothing but hits was measured"
    figures = {name: summary(seconds) for name, seconds in took.items()}
    kept = figures["kept_grpc"]["p50_ms"]
    result = {
        "times": figures,
        "ratios_to_kept_grpc": {name: round(each["p50_ms"] / kept, 2) for name, each in figures.items()},
    }
    say(f"{size} MiB: {json.dumps(result)}")
    return result


def _until_kept(daemon: DaemonProcess, study: str, count: int) -> None:
    while True:
        entries = daemon.call("GET", f"/v1/studies/{study}")["entries"]
        if sum((e["kind"], e["tier"]) == ("result", "ram") for e in entries) >= count:
            return


def _runs(client: Any) -> int:
    """How often the model has run."""
    told = client.get_inference_statistics("embed")
    return int(told.model_stats[0].execution_count)


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,32,128", help="MiB of volume")
    parser.add_argument("--rounds", type=int, default=0, help="0: fewer for larger sizes")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        work = Path(temporary)
        shutil.copytree(MODELS / "embed", work / "models" / "embed")
        config = work / "models" / "embed" / "config.pbtxt"
        config.write_text(config.read_text() + "response_cache { enable: true }\n")
        more = (f"--cache-config=local,size={64 * MIB}",)
        triton = stack.enter_context(TritonServer(work / "triton.log", [work / "models"], more=more))
        [port] = free_ports(1)
        settings = work / "voxcache.toml"
        budget = (sum(sizes) + 2 * max(sizes) + 64) * MIB
        settings.write_text(_SETTINGS.format(port=port, ram=budget * 2, nvme=budget * 3, work=work, triton=triton))
        (work / "bucket").mkdir()
        daemon = stack.enter_context(DaemonProcess(settings, work / "voxcache.log"))
        setting = Setting(daemon, f"127.0.0.1:{port}", triton, work / "bucket")
        found = {}
        for size in sizes:
            rounds = arguments.rounds or ROUNDS.get(size, 20)
            found[size] = measured(setting, size, rounds)
    times = found[max(sizes)]["times"]
    value = round(times["triton_region_grpc"]["p50_ms"] / times["kept_grpc"]["p50_ms"], 1)
    report = {
        "sizes_mib": {str(size): result for size, result in found.items()},
        "bars": plain([at_least(BAR, value, LEAST)]),
    }
    machine = {"python": platform.python_version(), "machine": platform.platform()}
    RESULTS.write_text(json.dumps({"machine": machine, **report}, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if value >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
