"""The real servers that the daemon's tests stand on."""

from tests.serving.doors import front
from tests.triton_service import triton

__all__ = ["front", "triton"]
