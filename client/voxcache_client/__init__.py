"""Volumes from voxcache as NumPy arrays: a view of the daemon's memory on its own node, a copy over HTTP elsewhere."""

from .client import AsyncClient, Client
from .errors import BadRequest, BadSource, Denied, NotFound, Refused, ServerFailed, Unreachable, VoxcacheError
from .tensor import Tensor

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BadRequest",
    "BadSource",
    "Client",
    "Denied",
    "NotFound",
    "Refused",
    "ServerFailed",
    "Tensor",
    "Unreachable",
    "VoxcacheError",
]
