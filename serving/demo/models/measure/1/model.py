"""Measure a volume: the voxels above a threshold (parameter ``threshold``), their share, their centroid, and the mean.

Counts are integers and sums are taken in float64, so the same bytes give the same numbers, bit for bit.
"""

import ctypes
import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.threshold = float(parameters["threshold"]["string_value"])

    def execute(self, requests):
        return [self.measure(request) for request in requests]

    def measure(self, request):
        volume = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "VOLUME"))
        above = volume > self.threshold
        voxels = int(np.count_nonzero(above))
        answer = {
            "VOXELS": np.array([voxels], np.int64),
            "FRACTION": np.array([voxels / max(volume.size, 1)]),
            "MEAN": np.array([volume.mean(dtype=np.float64) if volume.size else 0.0]),
            "CENTROID": np.array([centre(above, axis, voxels) for axis in range(3)]),
        }
        return pb_utils.InferenceResponse([output(name, value) for name, value in answer.items()])


def output(name, array):
    """A tensor to answer with, passed as DLPack: the backend's own conversion takes NumPy 2's arrays for empty ones."""
    capsule = array.__dlpack__()
    # The backend frees the array, but marks the capsule in its own way, which NumPy's destructor takes for an error.
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)


def centre(above, axis, voxels):
    """The mean index along ``axis`` of the voxels that are above; -1 without any."""
    if not voxels:
        return -1.0
    others = tuple(other for other in range(3) if other != axis)
    counts = np.count_nonzero(above, axis=others)
    return int(counts @ np.arange(len(counts))) / voxels
