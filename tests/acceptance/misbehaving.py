"""Ops that misbehave: what the workers have to survive."""

import os
import threading
from typing import ClassVar

from cache.entry import TensorSpec
from cache.recipe.ops import Array, Op


class Hangs(Op, frozen=True, forbid_unknown_fields=True):
    """Never ends."""

    name: ClassVar[str] = "hangs"
    version: ClassVar[int] = 1

    def run(self, array: Array, spec: TensorSpec) -> Array:
        threading.Event().wait()
        return array


class Dies(Op, frozen=True, forbid_unknown_fields=True):
    """Takes its process down."""

    name: ClassVar[str] = "dies"
    version: ClassVar[int] = 1

    def run(self, array: Array, spec: TensorSpec) -> Array:
        os._exit(3)
