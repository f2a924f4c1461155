"""The way without voxcache: what an inference service does for each request when nothing is kept ready.

A plain pydicom loop over the files, the same recipe on the array, and the tensor's bytes sent to Triton.
"""

import io
from pathlib import Path

import numpy as np
import pydicom
import tritonclient.http

from cache.entry import TensorSpec
from cache.recipe.chain import Recipe


def read(folder: Path) -> list[bytes]:
    """Fetch: every object of the series, whole."""
    return [path.read_bytes() for path in sorted(folder.glob("*.dcm"))]


def decode(objects: list[bytes]) -> tuple[np.ndarray, TensorSpec]:
    """Decode, sort along the patient's axis from the head down, rescale: int16 (z, y, x) in HU, for an axial series."""
    slices = [pydicom.dcmread(io.BytesIO(data)) for data in objects]
    slices.sort(key=lambda s: float(s.ImagePositionPatient[2]), reverse=True)
    volume = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
    first, second = slices[0], slices[1]
    rows, columns = (float(v) for v in first.PixelSpacing)
    origin = [float(v) for v in first.ImagePositionPatient]
    step = float(second.ImagePositionPatient[2]) - origin[2]
    spec = TensorSpec(
        dtype="int16",
        shape=volume.shape,
        axes="zyx",
        spacing=(abs(step), rows, columns),
        affine=(
            (0.0, 0.0, columns, origin[0]),
            (0.0, rows, 0.0, origin[1]),
            (step, 0.0, 0.0, origin[2]),
            (0.0, 0.0, 0.0, 1.0),
        ),
        units="HU",
    )
    return volume.astype(np.int16), spec


def prepare(volume: np.ndarray, spec: TensorSpec, recipe: Recipe) -> np.ndarray:
    """The recipe's steps, one after the other."""
    for op in recipe.steps:
        volume, spec = op.run(volume, spec), op.plan(spec)
    return np.ascontiguousarray(volume)


def infer(client: tritonclient.http.InferenceServerClient, model: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Send the tensor's bytes to Triton and take the model's answer."""
    volume = tritonclient.http.InferInput("VOLUME", list(tensor.shape), "FP32")
    volume.set_data_from_numpy(tensor)
    return outputs(client.infer(model, [volume]))


def outputs(answer: tritonclient.http.InferResult) -> dict[str, np.ndarray]:
    """Every output of an answer, by name."""
    return {output["name"]: answer.as_numpy(output["name"]) for output in answer.get_response()["outputs"]}
