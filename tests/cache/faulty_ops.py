"""Ops that misbehave in a worker, on demand and in step with the test."""

import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np

from cache.entry import TensorSpec
from cache.recipe.ops import Array, Op

PLUGINS = tuple(f"tests.cache.faulty_ops:{name}" for name in ("Hold", "Hog", "Note", "Forge", "Fail"))


class Hold(Op, frozen=True):
    """Tells its process id through one FIFO, then stays until another has been opened and closed."""

    name: ClassVar[str] = "hold"
    version: ClassVar[int] = 1

    started: str
    release: str

    def run(self, array: Array, spec: TensorSpec) -> Array:
        Path(self.started).write_text(str(os.getpid()))
        Path(self.release).read_text()
        return array


class Hog(Op, frozen=True):
    """Takes a GiB of memory."""

    name: ClassVar[str] = "hog"
    version: ClassVar[int] = 1

    def run(self, array: Array, spec: TensorSpec) -> Array:
        hoard = [np.ones(16 << 20, np.uint8) for _ in range(64)]
        return array + len(hoard)


class Note(Op, frozen=True):
    """Leaves a line in a file."""

    name: ClassVar[str] = "note"
    version: ClassVar[int] = 1

    path: str
    line: str

    def run(self, array: Array, spec: TensorSpec) -> Array:
        with Path(self.path).open("a") as file:
            file.write(self.line + "\n")
        return array


class Forge(Op, frozen=True):
    """Answers the pool itself, as hostile code would."""

    name: ClassVar[str] = "forge"
    version: ClassVar[int] = 1

    answer: str

    def run(self, array: Array, spec: TensorSpec) -> Array:
        os.write(int(sys.argv[1]), bytes.fromhex(self.answer))
        return array


class Fail(Op, frozen=True):
    """Fails with words that should stay where they are."""

    name: ClassVar[str] = "fail"
    version: ClassVar[int] = 1

    def run(self, array: Array, spec: TensorSpec) -> Array:
        raise ValueError("Doe^John")
