"""Embed a volume: where it is bright and where it is uneven, on a coarse grid, projected to 64 numbers.

No learned weights, but an honest function of every voxel: the same bytes give the same embedding, bit for bit.
"""

import ctypes
import itertools

import numpy as np
import triton_python_backend_utils as pb_utils

CELLS = 4  # along each axis
SIZE = 64


class TritonPythonModel:
    def initialize(self, args):
        # legacy seeding: its stream is frozen, whatever the NumPy version
        self.projection = np.random.RandomState(20240229).standard_normal((SIZE, 2 * CELLS**3))

    def execute(self, requests):
        return [self.embed(request) for request in requests]

    def embed(self, request):
        volume = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "VOLUME"))
        means, spreads = np.transpose([moments(cell) for cell in cells(volume)])
        scale = spreads.max() or 1.0
        features = np.concatenate([(means - means.mean()) / scale, spreads / scale])
        projected = (self.projection * features).sum(axis=1)
        embedding = (projected / (np.linalg.norm(projected) or 1.0)).astype(np.float32)
        return pb_utils.InferenceResponse([output("EMBEDDING", embedding)])


def output(name, array):
    """A tensor to answer with, passed as DLPack: the backend's own conversion takes NumPy 2's arrays for empty ones."""
    capsule = array.__dlpack__()
    # The backend frees the array, but marks the capsule in its own way, which NumPy's destructor takes for an error.
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)


def cells(volume):
    """The grid's blocks, in order; empty ones where an axis is shorter than the grid."""
    edges = [np.linspace(0, n, CELLS + 1).astype(int) for n in volume.shape]
    spans = [[slice(a, b) for a, b in itertools.pairwise(e)] for e in edges]
    return (volume[span] for span in itertools.product(*spans))


def moments(cell):
    """Mean and standard deviation, in float64."""
    if cell.size == 0:
        return 0.0, 0.0
    values = cell.astype(np.float64).ravel()
    return values.mean(), values.std()
