"""The native HTTP API, asked of a real daemon: representations, ranges, conditions, leases, lineage."""

import io
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import openapi_spec_validator
import pytest
import safetensors.numpy

from cache.keys import SeriesRef
from tests.daemon import Bucket, Daemon

pytestmark = pytest.mark.service


@pytest.fixture
def ref(bucket: Bucket) -> SeriesRef:
    return bucket.series(slices=6, rows=48, columns=40)


def array_of(body: bytes, spec: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(body, dtype=spec["dtype"]).reshape(spec["shape"])


def test_three_media_types_hold_the_same_tensor(daemon: Daemon, ref: SeriesRef) -> None:
    """Raw bytes, .npy and safetensors are the same array; each has an ETag of its own."""
    raw = daemon.tensor(ref)
    assert raw.status == 200
    assert raw.headers["Content-Type"] == "application/octet-stream"
    spec = json.loads(raw.headers["Voxcache-Spec"])
    assert spec["shape"] == [6, 48, 40]
    volume = array_of(raw.body, spec)
    npy = daemon.tensor(ref, Accept="application/x-npy")
    assert np.array_equal(np.load(io.BytesIO(npy.body)), volume)
    st = daemon.tensor(ref, Accept="application/vnd.safetensors")
    assert np.array_equal(safetensors.numpy.load(st.body)["tensor"], volume)
    assert len({answer.headers["ETag"] for answer in (raw, npy, st)}) == 3
    assert daemon.tensor(ref, Accept="text/html").status == 400


def test_the_answer_says_how_it_came_about(daemon: Daemon, ref: SeriesRef) -> None:
    """First a fill with its stages, then a hit; the lineage names objects, recipe and decoders."""
    first, second = daemon.tensor(ref), daemon.tensor(ref)
    assert (first.headers["Voxcache-Tier"], second.headers["Voxcache-Tier"]) == ("origin", "ram")
    assert {part.split(";")[0] for part in first.headers["Server-Timing"].split(", ")} >= {"list", "fetch", "decode"}
    lineage = daemon.ask("GET", first.headers["Voxcache-Lineage"]).json["entries"][0]
    assert lineage["entry"]["lineage"]["objects"] == 6
    assert len(lineage["manifest"]["objects"]) == 6
    assert json.loads(lineage["entry"]["lineage"]["recipe"])
    assert daemon.metric("voxcache_requests_total", tier="ram", status="200") == 1


def test_ranges(daemon: Daemon, ref: SeriesRef) -> None:
    """One range is answered with 206, also across the header of .npy; a bad one with 416 and the true size."""
    whole = daemon.tensor(ref).body
    part = daemon.tensor(ref, Range="bytes=100-299")
    assert (part.status, part.body) == (206, whole[100:300])
    assert part.headers["Content-Range"] == f"bytes 100-299/{len(whole)}"
    assert daemon.tensor(ref, Range="bytes=-7").body == whole[-7:]
    assert daemon.tensor(ref, Range=f"bytes={len(whole) - 3}-").body == whole[-3:]
    npy = daemon.tensor(ref, Accept="application/x-npy").body
    assert daemon.tensor(ref, Accept="application/x-npy", Range="bytes=10-400").body == npy[10:401]
    outside = daemon.tensor(ref, Range=f"bytes={len(whole)}-")
    assert (outside.status, outside.code) == (416, "range-not-satisfiable")
    assert outside.headers["Content-Range"] == f"bytes */{len(whole)}"
    stale = daemon.ask(
        "GET",
        f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume",
        headers={"Range": "bytes=0-9", "If-Range": '"another"'},
    )
    assert (stale.status, stale.body) == (200, whole)


def test_conditions_and_head(daemon: Daemon, ref: SeriesRef) -> None:
    """A known ETag gets 304 with no body; HEAD says the size and sends nothing."""
    answer = daemon.tensor(ref)
    same = daemon.tensor(ref, If_None_Match=answer.headers["ETag"])
    assert (same.status, same.body) == (304, b"")
    head = daemon.ask("HEAD", f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(answer.body)))


def test_instances_are_the_origins_own_bytes(daemon: Daemon, bucket: Bucket, ref: SeriesRef) -> None:
    """Each object, by number and by its SOP Instance UID, as a whole and in part; with the origin's ETag."""
    base = f"/v1/studies/{ref.study}/series/{ref.series}/instances"
    listed = daemon.ask("GET", base).json["instances"]
    files = {f"{ref.study}/{ref.series}/{path.name}": path for path in bucket.files(ref)}
    assert [each["key"] for each in listed] == sorted(files)
    for each in listed:
        content = files[each["key"]].read_bytes()
        answer = daemon.ask("GET", f"{base}/{each['number']}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/dicom")
        assert answer.body == content and len(content) == each["nbytes"]
        assert answer.headers["ETag"] == f'"{each["etag"]}"'
        by_uid = daemon.ask("GET", f"{base}/{Path(each['key']).stem}", headers={"Range": "bytes=128-131"})
        assert (by_uid.status, by_uid.body, by_uid.headers["Voxcache-Tier"]) == (206, b"DICM", "ram")
    known = daemon.ask("GET", f"{base}/0", headers={"If-None-Match": f'"{listed[0]["etag"]}"'})
    assert (known.status, known.body) == (304, b"")
    head = daemon.ask("HEAD", f"{base}/0")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(listed[0]["nbytes"]))
    missing = daemon.ask("GET", f"{base}/6")
    assert (missing.status, missing.code) == (404, "not-found")


def test_a_lease_shows_the_very_bytes(daemon: Daemon, ref: SeriesRef) -> None:
    """The leased extent holds what GET sends; while it is held nothing evicts it; released, it goes."""
    granted = daemon.ask("POST", "/v1/leases", {"study": ref.study, "series": ref.series, "recipe": "volume"})
    assert granted.status == 201
    lease = granted.json
    with Path("/dev/shm", lease["shm"]).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapped[lease["offset"] : lease["offset"] + lease["nbytes"]] == daemon.tensor(ref).body
    mapped.close()
    assert daemon.metric("voxcache_leases") == 1
    daemon.until_written(ref)
    evict = f"/v1/studies/{ref.study}"
    daemon.ask("DELETE", evict)
    held = [e for e in daemon.ask("GET", evict).json["entries"] if e["tier"] == "ram"]
    assert [e["pins"] for e in held] == [1]
    renewed = daemon.ask("POST", f"/v1/leases/{lease['lease']}/renew", {"ttl_s": 120})
    assert renewed.json["expires"] > lease["expires"]
    assert daemon.ask("DELETE", f"/v1/leases/{lease['lease']}").status == 204
    daemon.ask("DELETE", evict)
    assert daemon.ask("GET", evict).json["entries"] == []


def test_a_changed_series_is_a_new_version(daemon: Daemon, bucket: Bucket, ref: SeriesRef) -> None:
    """A slice that joins the origin changes the answer and its ETag at the next request."""
    before = daemon.tensor(ref)
    for path in bucket.files(bucket.series(slices=7, rows=48, columns=40, study_uid=ref.study, series_uid=ref.series)):
        assert path.exists()
    after = daemon.tensor(ref)
    assert after.headers["ETag"] != before.headers["ETag"]
    assert json.loads(after.headers["Voxcache-Spec"])["shape"][0] == 7


def test_health_and_description(daemon: Daemon) -> None:
    """The daemon says it lives and is ready, and describes itself in valid OpenAPI."""
    assert daemon.ask("GET", "/livez").status == 200
    assert daemon.ask("GET", "/readyz").json["checks"] == {"triton": False, "workers": True, "arrivals": True}
    description = daemon.ask("GET", "/openapi.json").json
    openapi_spec_validator.validate(description)
    assert "/v1/leases/{lease}/renew" in description["paths"]
