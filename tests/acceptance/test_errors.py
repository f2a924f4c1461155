"""Bad input and broken neighbours: each has its own typed error and documented status, and harms nothing else."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef
from tests.acceptance import misbehaving
from tests.daemon import Bucket, Daemon

pytestmark = pytest.mark.service

NOBODY = SeriesRef("1.2.3.4", "1.2.3.4.5")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Bucket]]:
    """One daemon for all bad series: that it answers the last test as it did the first is part of the test."""
    folder = tmp_path_factory.mktemp("errors")
    bucket = Bucket(folder / "bucket")
    with Daemon(folder, {"origin": bucket.origin, "leases": {"grace_s": 0.0}}) as daemon:
        yield daemon, bucket


def broken(bucket: Bucket, spoil: Callable[[list[Path]], None]) -> SeriesRef:
    ref = bucket.series(slices=6, rows=16, columns=16)
    spoil(bucket.files(ref))
    return ref


def not_dicom(files: list[Path]) -> None:
    files[2].write_bytes(b"this is no DICOM file" * 100)


def truncated(files: list[Path]) -> None:
    data = files[2].read_bytes()
    files[2].write_bytes(data[: len(data) - 100])


def by_position(files: list[Path]) -> list[Path]:
    import pydicom

    return sorted(files, key=lambda path: float(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2]))


def missing_slice(files: list[Path]) -> None:
    by_position(files)[2].unlink()


def duplicate_slice(files: list[Path]) -> None:
    import pydicom

    twin = pydicom.dcmread(files[2])
    twin.SOPInstanceUID = twin.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    twin.save_as(files[2].with_name("twin.dcm"))


def mixed_orientations(files: list[Path]) -> None:
    import pydicom

    for path in files[:3]:
        turned = pydicom.dcmread(path)
        turned.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        turned.save_as(path)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (not_dicom, "not-dicom"),
        (truncated, "truncated-object"),
        (missing_slice, "missing-slice"),
        (duplicate_slice, "duplicate-slice"),
        (mixed_orientations, "mixed-orientations"),
    ],
)
def test_a_bad_series_is_refused_with_its_reason(
    shared: tuple[Daemon, Bucket], spoil: Callable[[list[Path]], None], code: str
) -> None:
    """422 with the type of the fault and the instances named; a good series right after is served."""
    daemon, bucket = shared
    answer = daemon.tensor(broken(bucket, spoil))
    assert (answer.status, answer.code) == (422, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["instances"]
    assert daemon.tensor(bucket.series(slices=4, rows=16, columns=16)).status == 200


def test_what_does_not_exist(shared: tuple[Daemon, Bucket]) -> None:
    """Unknown study, empty series and unknown recipe are 404s of three types; malformed UIDs are 400."""
    daemon, bucket = shared
    known = bucket.series(slices=4, rows=16, columns=16)
    for ref, recipe, expected in [
        (NOBODY, "volume", (404, "unknown-study")),
        (SeriesRef(known.study, NOBODY.series), "volume", (404, "empty-series")),
        (known, "nothing", (404, "unknown-recipe")),
        (SeriesRef("1.2.evil", known.series), "volume", (400, "malformed-uid")),
        (SeriesRef(known.study, "..%2f..%2fetc"), "volume", (400, "malformed-uid")),
    ]:
        answer = daemon.tensor(ref, recipe)
        assert (answer.status, answer.code) == expected
    answer = daemon.ask("GET", f"/v1/studies/{known.study}/series/{known.series}/tensors/volume?namespace=nobody")
    assert (answer.status, answer.code) == (404, "unknown-namespace")


def test_bad_bodies(shared: tuple[Daemon, Bucket]) -> None:
    """A body that is no JSON, lacks a field or is too large is a 400 that says which."""
    daemon, _ = shared
    for path, body in [
        ("/v1/leases", b"{"),
        ("/v1/leases", b'{"study": "1.2"}'),
        ("/v1/arrivals/s3", b'{"Records": 5}'),
        ("/v1/arrivals/s3", b"[" * (2 << 20)),
        ("/v1/warm", b'{"tensors": ["one"]}'),
    ]:
        answer = daemon.ask("POST", path, body)
        assert answer.status == 400, path
        assert answer.json["detail"]
    assert daemon.ask("POST", "/v1/arrivals/pigeon", b"{}").status == 404


def test_an_expired_lease(shared: tuple[Daemon, Bucket]) -> None:
    """An expired lease is 410, one that never was 404."""
    daemon, bucket = shared
    ref = bucket.series(slices=4, rows=16, columns=16)
    asked = {"study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 0.01}
    lease = daemon.ask("POST", "/v1/leases", asked).json
    while time.time() < lease["expires"] + 0.01:
        time.sleep(0.01)  # it expires by the clock of another process
    renewed = daemon.ask("POST", f"/v1/leases/{lease['lease']}/renew", {})
    assert (renewed.status, renewed.code) == (410, "lease-expired")
    never = daemon.ask("DELETE", "/v1/leases/0123456789abcdef0123456789abcdef")
    assert (never.status, never.code) == (404, "unknown-lease")


def test_triton_down(tmp_path: Path, bucket: Bucket) -> None:
    """With Triton away inference is 503 in KServe's own form; tensors are served all the same."""
    ref = bucket.series(slices=4, rows=16, columns=16)
    with Daemon(tmp_path, {"origin": bucket.origin, "triton": {"url": "http://127.0.0.1:1"}}) as daemon:
        reference = {
            "name": "REFERENCE",
            "shape": [1],
            "datatype": "BYTES",
            "data": [f"{ref.study}/{ref.series}/volume"],
        }
        answer = daemon.ask("POST", "/v2/models/embed.ref/infer", {"inputs": [reference]})
        assert answer.status == 503
        assert "Retry-After" in answer.headers
        assert answer.json["error"]
        assert daemon.tensor(ref).status == 200


@pytest.mark.parametrize(("recipe", "code", "status"), [("hangs", "worker-timeout", 504), ("dies", "worker-died", 500)])
async def test_a_worker_that_hangs_or_dies_fails_its_request_only(
    tmp_path: Path, bucket: Bucket, recipe: str, code: str, status: int
) -> None:
    """The request ends with its typed error within the job's limit; another one beside it is served."""
    ref, good = (bucket.series(slices=4, rows=16, columns=16) for _ in range(2))
    plugins = [f"{misbehaving.__name__}:{op}" for op in ("Hangs", "Dies")]
    table = {
        "origin": bucket.origin,
        "workers": {"count": 2, "job_timeout_s": 2.0, "plugins": plugins},
        "recipes": {name: {"version": 1, "ops": [{"op": "volume"}, {"op": name}]} for name in ("hangs", "dies")},
    }
    with Daemon(tmp_path, table) as daemon:
        failing = asyncio.create_task(asyncio.to_thread(daemon.tensor, ref, recipe))
        assert (await asyncio.to_thread(daemon.tensor, good)).status == 200
        answer = await failing
        assert (answer.status, answer.code) == (status, code)
        assert daemon.tensor(ref).status == 200
        assert daemon.ask("GET", "/readyz").status == 200


def test_a_series_of_files_in_no_order_is_found_by_its_headers(tmp_path: Path, bucket: Bucket) -> None:
    """Files under any names are found by reading their headers once, when the origin is set up so."""
    study, series, files = write_series(tmp_path / "made", slices=5, rows=16, columns=16)
    for number, path in enumerate(files):
        path.rename(bucket.path / f"IM{number:04d}")
    find = {"template": "", "manifest": "", "headers": True}
    with Daemon(tmp_path, {"origin": bucket.origin, "find": find}) as daemon:
        assert daemon.tensor(SeriesRef(study, series)).status == 200
        assert daemon.tensor(NOBODY).code == "unknown-study"
