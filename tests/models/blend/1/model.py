"""A model with inputs beside the volume: it scales the volume, and returns the note."""

import ctypes

import numpy as np
import triton_python_backend_utils as pb_utils

# The backend, built against NumPy 1, reads text wrongly with NumPy 2. The note is passed on unread.
pb_utils.deserialize_bytes_tensor = lambda encoded: np.empty(1, object)


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        scan, scale, note = (pb_utils.get_input_tensor_by_name(request, name) for name in ("SCAN", "SCALE", "NOTE"))
        scaled = np.from_dlpack(scan).astype(np.float32) * np.from_dlpack(scale).reshape(-1, 1, 1, 1, 1)
        return pb_utils.InferenceResponse([output("SCALED", scaled), note])


def output(name, array):
    """A tensor to answer with, as the demo's models make theirs."""
    capsule = array.__dlpack__()
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
