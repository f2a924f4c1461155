"""A decoupled model: none, one or several answers to a request."""

import ctypes

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            volume, times = (
                np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in ("VOLUME", "TIMES")
            )
            for number in range(int(times[0])):
                answer = output("SUM", np.array([volume.sum(dtype=np.float64) + number]))
                sender.send(pb_utils.InferenceResponse([answer]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def output(name, array):
    """A tensor to answer with, as the demo's models make theirs."""
    capsule = array.__dlpack__()
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
