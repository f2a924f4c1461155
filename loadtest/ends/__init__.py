"""The model that an inference costs nothing with: it reads the ends of its volume where they lie (``ends.c``)."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_CONFIG: Final = """
name: "{name}"
backend: "ends"
max_batch_size: 0
input [{{ name: "VOLUME" data_type: TYPE_INT16 dims: [-1, -1, -1] }}]
output [{{ name: "ENDS" data_type: TYPE_INT16 dims: [2] }}]
instance_group [{{ count: 4 kind: KIND_CPU }}]
{more}
"""


def build(folder: Path, models: Mapping[str, str]) -> Path:
    """A model repository in ``folder``: for each name, the model with ``more`` in its configuration. Needs gcc."""
    library = folder / "libtriton_ends.so"
    source = Path(__file__).with_name("ends.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    repository = folder / "models"
    for name, more in models.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(_CONFIG.format(name=name, more=more))
        (repository / name / "1" / library.name).hardlink_to(library)
    return repository
