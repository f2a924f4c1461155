"""A small synthetic series, and the way from objects to a volume."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from cache.dicom.assemble import VolumeOptions, VolumePlan, plan_volume
from cache.dicom.decode import decode_plan
from cache.dicom.header import read_header
from cache.dicom.phantom import write_series

Array = npt.NDArray[Any]


def volume_of(objects: Sequence[bytes], options: VolumeOptions | None = None) -> tuple[VolumePlan, Array]:
    """The whole way, as a worker goes it."""
    views = [memoryview(data) for data in objects]
    plan = plan_volume([read_header(view, member) for member, view in enumerate(views)], options or VolumeOptions())
    volume = np.empty(plan.spec.shape, plan.spec.dtype)
    decode_plan([views[header.member] for header in plan.objects], plan, volume)
    return plan, volume


def rewritten(data: bytes, **changes: Any) -> bytes:
    """A copy of the object with some attributes changed, or removed where the value is None."""
    ds = pydicom.dcmread(BytesIO(data))
    for keyword, value in changes.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Twelve slices of 40 × 48, from the feet to the head."""
    paths = write_series(tmp_path_factory.mktemp("phantom"), slices=12, rows=40, columns=48)[2]
    return [path.read_bytes() for path in paths]


def objects_in(folder: Path) -> list[bytes]:
    """The folder's files as numbered by whoever made them: I20 before I100, so that the first few are neighbours."""
    return [path.read_bytes() for path in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))]
