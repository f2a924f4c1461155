"""A model that takes batches."""

import ctypes

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        scan, scale = (np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in ("SCAN", "SCALE"))
        return pb_utils.InferenceResponse([output("SCALED", scan.astype(np.float32) * scale.reshape(-1, 1, 1, 1))])


def output(name, array):
    """A tensor to answer with, as the demo's models make theirs."""
    capsule = array.__dlpack__()
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
