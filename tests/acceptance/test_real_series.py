"""Real series, from a real bucket through the daemon to the client: highdicom's volume, or the refusal they deserve."""

import asyncio
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest

from cache.keys import SeriesRef
from tests.cache.dicom.test_real_series import REFUSED, REGULAR, oracle
from tests.daemon import MIB, Daemon
from tests.services import S3Service
from voxcache_client import BadSource, Client

pytestmark = pytest.mark.service


def objects_of(folder: Path) -> tuple[SeriesRef, dict[str, bytes]]:
    """The series a folder holds, and its objects under the keys of the default template."""
    objects = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        ds = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
        ref = SeriesRef(str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID))
        objects[f"{ref.study}/{ref.series}/{ds.SOPInstanceUID}.dcm"] = data
    return ref, objects


@pytest.fixture(scope="module")
def series(testdata: Path) -> dict[str, tuple[SeriesRef, dict[str, bytes]]]:
    folders = sorted((testdata / "dicom" / "series").iterdir())
    assert {folder.name for folder in folders} == REGULAR.keys() | REFUSED.keys()
    return {folder.name: objects_of(folder) for folder in folders}


@pytest.fixture(scope="module")
def bucket(s3: S3Service, series: Mapping[str, tuple[SeriesRef, dict[str, bytes]]]) -> str:
    everything = {key: data for _, objects in series.values() for key, data in objects.items()}
    return asyncio.run(s3.bucket(everything))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, s3: S3Service, bucket: str) -> Iterator[Client]:
    settings = {
        "bucket": bucket,
        "endpoint_url": s3.endpoint,
        "access_key": s3.access_key,
        "secret_key": s3.secret_key,
    }
    table = {"origin": {"s3": settings}, "ram": {"budget": 512 * MIB}, "nvme": {"budget": 1024 * MIB}}
    with Daemon(tmp_path_factory.mktemp("real"), table) as daemon, Client(daemon.url) as client:
        yield client


@pytest.mark.parametrize("name", REGULAR)
def test_a_regular_series_arrives_as_highdicom_has_it(
    client: Client, series: Mapping[str, tuple[SeriesRef, dict[str, bytes]]], name: str
) -> None:
    """Voxels and affine are the oracle's, bit for bit, in a view of the daemon's own memory."""
    ref, objects = series[name]
    expected = oracle(list(objects.values()), rescale=True)
    with client.tensor(ref.study, ref.series, "volume") as tensor:
        assert tensor.local
        assert np.array_equal(tensor.array, expected.array)
        assert np.array_equal(tensor.affine, expected.affine)


@pytest.mark.parametrize("name", REFUSED)
def test_an_irregular_series_is_refused(
    client: Client, series: Mapping[str, tuple[SeriesRef, dict[str, bytes]]], name: str
) -> None:
    """The refusal has the type of the fault, and names instances."""
    ref, _ = series[name]
    with pytest.raises(BadSource) as refusal:
        client.tensor(ref.study, ref.series, "volume")
    assert (refusal.value.status, refusal.value.code) == (422, REFUSED[name].code)
