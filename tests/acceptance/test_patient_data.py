"""Patient data stays within DICOM objects, whatever a daemon is asked; and who asked for what is recorded."""

import base64
import contextlib
import io
import json
import re
import socket
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis as redis_client
import tritonclient.grpc

from cache.keys import SeriesRef
from serving import cli
from serving.arrivals.sources import SOURCES
from serving.audit.spool import files
from serving.demo.tritonserver import TritonServer
from tests.daemon import Bucket, Daemon
from tests.planted import BROKEN, PLANTED, SHOWN, mark, planted
from tests.services import RedisServer, free_port, redis_server

pytestmark = [pytest.mark.service, pytest.mark.slow]

_TENSOR = [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]
RECIPES = {
    "raw": {"version": 1, "ops": [{"op": "volume"}]},
    "tensor": {"version": 1, "ops": _TENSOR},
    "vector": {"version": 1, "ops": [*_TENSOR, {"op": "infer", "model": "embed", "output": "EMBEDDING"}]},
}
CATALOGUE = "nvme/catalog.sqlite"  # the daemon has ended: what it noted beside it is in it
RULES = [{"name": "by description", "description": "ZQ7XDESC", "recipes": ["raw"]}]
CLAIMS = {"PatientName": f"{mark(0x00100010)}^Canary", "PatientID": mark(0x00100020), "PatientBirthDate": "19110307"}


class Scene(msgspec.Struct):
    """What a daemon that was asked everything has left: by place, what stands there."""

    good: SeriesRef
    packed: SeriesRef
    late: SeriesRef
    told: dict[str, bytes]
    plans: dict[str, bytes]
    codes: set[str]
    folder: Path


class Play:
    """Asks, and keeps every answer: its headers, its body, and the URL that it says to go to."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.told: dict[str, bytes] = {}
        self.codes: set[str] = set()

    def ask(self, method: str, path: str, body: Any = None, *, kept: bool = True, **headers: Any) -> Any:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.daemon.ask(method, path, body, sent)
        place = f"{len(self.told)}: {method} {path}"
        self.told[place] = json.dumps(answer.headers).encode() + (answer.body if kept else b"")
        if "problem+json" in answer.headers.get("Content-Type", ""):
            self.codes.add(answer.code)
        return answer

    def command(self, *arguments: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main([*arguments, "--url", self.daemon.url]) == 0
        self.told[f"voxcache {' '.join(arguments)}"] = said.getvalue().encode()
        return said.getvalue()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, triton: TritonServer) -> Iterator[Scene]:
    """A daemon with all it can have around it, through all that it does."""
    folder = tmp_path_factory.mktemp("patient")
    bucket = Bucket(folder / "bucket")
    good, late = (planted(bucket.path, seed) for seed in (1, 3))
    packed = planted(bucket.path, 2, transfer_syntax="1.2.840.10008.1.2.4.90")
    broken = {name: planted(bucket.path, 10 + at, edit) for at, (name, edit) in enumerate(BROKEN.items())}
    for name, cut in (("within pixels", -500), ("within the header", 3000)):
        broken[name] = planted(bucket.path, 50 + len(broken), lambda ds, number: None)
        path = bucket.files(broken[name])[2]
        path.write_bytes(path.read_bytes()[:cut])
    broken["not DICOM"] = planted(bucket.path, 90, lambda ds, number: None)
    bucket.files(broken["not DICOM"])[0].write_bytes(f"patient {mark(0x00100010)}".encode() * 100)
    grpc = free_port()
    table = {
        "origin": bucket.origin,
        "grpc": {"port": grpc},
        "log": {"level": "debug", "slow_ms": 0.0},
        "audit": {"flush_s": 0.05},
        "triton": {
            "url": triton.url,
            "grpc": triton.grpc_url,
            "models": {"embed": {"recipe": "tensor", "results": True}},
        },
        "webhooks": {"secrets": {"azure": {"bearer": "known"}}},
        "recipes": RECIPES,
        "plan": {"rules": RULES},
        "retention": {"sweep_s": 0.2, "rules": [{"name": "short", "modality": ["ZZ"], "max_age_days": 1}]},
    }
    with (
        redis_server(folder / "redis") as redis,
        Daemon(folder, table | {"redis": {"url": redis.url, "prefix": "canary"}}) as daemon,
    ):
        play = Play(daemon)
        plans = asked(play, {"good": good, "packed": packed, "late": late, **broken}, grpc)
        told = play.told | around(daemon, redis)
    told["log"] = (folder / "voxcache.log").read_bytes()
    told["audit"] = b"".join(path.read_bytes() for path in files(folder / "state" / "audit"))
    told |= left(folder)
    yield Scene(good, packed, late, told, plans, play.codes, folder)


def asked(play: Play, series: Mapping[str, SeriesRef], grpc: int) -> dict[str, bytes]:
    """Every route, what goes wrong included; the answers that may tell of what a series is of, apart."""
    good, packed, gap = series["good"], series["packed"], series["gap"]
    study = f"/v1/studies/{good.study}"
    for name, ref in series.items():
        if name == "late":  # it is only announced
            continue
        where = f"/v1/studies/{ref.study}"
        its = f"{where}/series/{ref.series}"
        play.ask("GET", f"{its}/tensors/raw", Accept="application/vnd.safetensors")
        play.ask("GET", f"{its}/tensors/vector", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        play.ask("POST", "/v1/leases", {"study": ref.study, "series": ref.series, "recipe": "tensor"})
        play.ask("GET", where)
        play.ask("GET", f"{where}/lineage")
        if name in ("good", "packed"):
            play.ask("POST", f"{where}/verify")
        play.ask("GET", f"{its}/instances")
    play.ask("GET", f"/v1/studies/{good.study}/series/{good.series}/instances/0", kept=False)  # a DICOM object
    for _ in range(2):  # the second time it is an answer that was kept
        given = [{"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": [f"{good.study}/{good.series}"]}]
        play.ask("POST", "/v2/models/embed.ref/infer", {"inputs": given})
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
        for ref in (good, gap):
            given = tritonclient.grpc.InferInput("REFERENCE", [1], "BYTES")
            given.set_data_from_numpy(np.array([f"{ref.study}/{ref.series}".encode()], object))
            try:
                answer = str(client.infer("embed.ref", [given]).get_response())
            except tritonclient.grpc.InferenceServerException as error:
                answer = str(error)
            play.told[f"gRPC {ref.series}"] = answer.encode()
    with socket.socket(socket.AF_UNIX) as handoff:
        handoff.connect(str(play.daemon.folder / "state" / "lease.sock"))
        stream = handoff.makefile("rwb")
        for number, ref in enumerate((good, gap)):
            asks = {"op": "lease", "id": number, "study": ref.study, "series": ref.series, "recipe": "raw"}
            stream.write(json.dumps(asks).encode() + b"\n")
            stream.flush()
            play.told[f"hand-off {number}"] = stream.readline()
    like = f"{good.study}/{good.series}/vector"
    play.ask("POST", "/v1/embeddings/query", {"like": like})
    announced(play, list(series.values()))
    play.ask("DELETE", f"/v1/studies/{packed.study}?series={packed.series}")
    play.ask("DELETE", f"/v1/studies/{packed.study}")
    for body in ({"studies": [packed.study, gap.study]}, {"modality": "CT"}, {"since_s": 1e9}):
        job = play.ask("POST", "/v1/warm", body).json["id"]
        play.ask("GET", f"/v1/warm/{job}/events")
        play.ask("GET", f"/v1/warm/{job}")
    job = play.ask("POST", "/v1/index", {}).json["id"]
    play.ask("GET", f"/v1/warm/{job}/events")
    play.ask("PUT", f"{study}/pin", {"tag": "legal-hold"})
    play.ask("GET", "/v1/pins")
    play.ask("DELETE", f"{study}/pin?tag=legal-hold")
    play.ask("GET", "/v1/dead-letters")
    play.ask("POST", "/v1/dead-letters", {})
    for path in (
        "/",
        "/page/page.js",
        "/v1/stats",
        "/livez",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/v2",
        "/nowhere",
    ):
        play.ask("GET", path)
    play.ask("GET", "/metrics", Accept="application/openmetrics-text")
    play.command("ls", good.study)
    play.command("pins")
    # what plans may look at is told to whoever asks for the plan
    plans = {
        "plan": play.ask("GET", f"{study}/plan", kept=False).body,
        "rehearsal": play.ask("POST", "/v1/plan", {"studies": [good.study]}, kept=False).body,
        "explain": play.command("explain", good.study, "--json").encode(),
    }
    del play.told[f"voxcache explain {good.study} --json"]
    return plans


def announced(play: Play, refs: Sequence[SeriesRef]) -> None:
    """Arrivals by every source, with claims about the patient that nobody asked for, and with nonsense."""
    for source in SOURCES.values():
        example: Any = json.loads(source.example)
        claiming: Any = [each | CLAIMS for each in example] if isinstance(example, list) else example | CLAIMS
        if source.name == "pubsub":
            claiming["message"]["attributes"] |= CLAIMS
            claiming["message"]["data"] = base64.b64encode(json.dumps(CLAIMS).encode()).decode()
        kind: dict[str, Any] = {"Content_Type": source.content_type}
        play.ask("POST", f"/v1/arrivals/{source.name}", claiming, **kind)
        play.ask("POST", f"/v1/arrivals/{source.name}", claiming, Authorization="Bearer known", **kind)
        play.ask("POST", f"/v1/arrivals/{source.name}", {name: [value] for name, value in CLAIMS.items()}, **kind)
        play.ask("POST", f"/v1/arrivals/{source.name}", mark(0x00100010).encode(), **kind)
    for ref in refs:
        body = {"study": ref.study, "series": ref.series, "complete": True, **CLAIMS}
        play.ask("POST", "/v1/arrivals/plain", body)
    for ref in refs:
        while play.ask("GET", f"/v1/studies/{ref.study}").json["waiting"]:
            time.sleep(0.02)  # another process, which tells this only when asked, and is at work on it


def around(daemon: Daemon, redis: RedisServer) -> dict[str, bytes]:
    """What the daemon has put elsewhere: in Redis, in shared memory."""
    with redis_client.Redis.from_url(redis.url) as client:
        keys = list(client.scan_iter(count=1000))
        assert keys
        dumped = {"Redis keys": b"\n".join(keys), "Redis values": b"\n".join(client.dump(key) or b"" for key in keys)}
    return dumped | {"arenas": "\n".join(str(path) for path in daemon.arenas()).encode()}


def left(folder: Path) -> dict[str, bytes]:
    """What lies on disk: every name, and every file's bytes, but for the objects in packs."""
    told = {}
    names = []
    for path in [*(folder / "nvme").rglob("*"), *(folder / "state").rglob("*")]:
        name = str(path.relative_to(folder))
        names.append(name)
        if path.is_file() and path.suffix != ".tar":
            told[name] = path.read_bytes()
        elif path.is_file():
            with tarfile.open(path) as pack:
                members = pack.getmembers()
                names += [member.name for member in members]
                for member in members:
                    content = pack.extractfile(member)
                    if content is not None and not member.name.endswith(".dcm"):
                        told[f"{name}: {member.name}"] = content.read()
    return told | {"file names": "\n".join(names).encode()}


def test_patient_data_stays_within_dicom_objects(scene: Scene) -> None:
    """None of what was planted is in any answer, log, metric, URL, file or key."""
    assert {"missing-slice", "irregular-series", "not-dicom", "truncated-object", "unauthorized"} <= scene.codes
    found = {
        place: sorted({found.decode(errors="replace") for found in PLANTED.findall(content)})
        for place, content in scene.told.items()
        if place != CATALOGUE and PLANTED.search(content)
    }
    assert found == {}


def test_what_was_planted_can_be_found(scene: Scene) -> None:
    """It is in the objects, and so in the packs: a search that finds nothing anywhere would prove nothing."""
    packs = list((scene.folder / "nvme").rglob("*.tar"))
    assert packs and all(PLANTED.search(path.read_bytes()) for path in packs)


def test_the_catalogue_holds_what_plans_look_at(scene: Scene) -> None:
    """Description and station, which rules may name, and which whoever asks for the plan is shown; nothing else."""
    shown = {text.encode() for text in SHOWN.values()}
    pattern = re.compile(rb"ZQ7X\w+|19110307")
    assert CATALOGUE in scene.told
    for place, content in (*scene.plans.items(), *scene.told.items()):
        if place in scene.plans or place == CATALOGUE:
            assert set(pattern.findall(content)) <= shown, place
    assert shown <= set(pattern.findall(scene.plans["plan"]))


def test_whoever_did_what_is_recorded(scene: Scene) -> None:
    """Reads over every door, warm-ups, pins, evictions, arrivals and refusals, each with its agent and its study."""
    records = [json.loads(line) for line in scene.told["audit"].splitlines()]
    acts: dict[tuple[str, str], list[str]] = {}
    for each in records:
        [entity] = each.get("entity", [{}])
        study = entity.get("what", {}).get("identifier", {}).get("value", "").removeprefix("urn:oid:")
        acts.setdefault((each["subtype"][0]["code"], each["agent"][0]["altId"]), []).append(study)
    for act, via in (
        *(("read", "http"), ("instance", "http"), ("lease", "http"), ("lease", "socket"), ("infer", "http")),
        *(("infer", "grpc"), ("answer", "http"), ("query", "http"), ("announce", "arrival")),
        *(("pin", "http"), ("unpin", "http"), ("verify", "http")),
    ):
        assert scene.good.study in acts[act, via], (act, via)
    assert scene.late.study in acts["warm", "arrival"]
    for act in ("warm", "evict", "drop"):
        assert scene.packed.study in acts[act, "http"]
    for key in (("start", "daemon"), ("stop", "daemon"), ("refuse", "arrival"), ("index", "http"), ("requeue", "http")):
        assert acts[key] == [""] * len(acts[key])
    failed = {each["outcomeDesc"] for each in records if each["outcome"] == "4"}
    assert {"missing-slice", "not-dicom", "unauthorized"} <= failed
    settings = scene.folder / "voxcache.toml"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["audit", "verify", "--config", str(settings)]) == 0
    assert said.getvalue() == f"{len(records)} records, 1 to {len(records)}: as they were written\n"
