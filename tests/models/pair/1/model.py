"""A model that compares two volumes."""

import ctypes

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        study, prior, weight = (
            np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in ("STUDY", "PRIOR", "WEIGHT")
        )
        change = study.sum(dtype=np.float64) - weight[0] * prior.sum(dtype=np.float64)
        return pb_utils.InferenceResponse([output("CHANGE", np.array([change]))])


def output(name, array):
    """A tensor to answer with, as the demo's models make theirs."""
    capsule = array.__dlpack__()
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
