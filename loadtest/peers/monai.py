"""MONAI's PersistentDataset: what a transform made is pickled to a folder, under a hash of what it was made of."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any, Final

from loadtest.outcome import ROOT
from loadtest.stand import Series

from .base import Peer, Tensor, get_all, volume_of

#: MONAI and PyTorch, apart from our own packages: they take a gigabyte and more.
_PACKAGES: Final = ROOT / ".services" / "monai"


class Monai(Peer):
    """https://docs.monai.io/en/stable/data.html#persistentdataset"""

    name = "MONAI PersistentDataset"
    settings = (
        "one transform that fetches and decodes, its result kept as torch.save writes it; nobody bounds the files"
    )
    ready = True

    def start(self, stack: contextlib.ExitStack) -> None:
        if not _PACKAGES.exists():
            raise RuntimeError("MONAI is not here: deploy/setup monai installs it, with PyTorch")
        sys.path.append(str(_PACKAGES))  # behind our own packages: both use the same NumPy
        stack.callback(sys.path.remove, str(_PACKAGES))
        self._origin = self.bucket.store()
        self._torch: Any = importlib.import_module("torch")
        self._data: Any = importlib.import_module("monai.data")
        transforms: Any = importlib.import_module("monai.transforms")
        self._made = transforms.Lambda(self._volume, track_meta=False)  # a plain function's result would not be kept
        self._sets: dict[str, Any] = {}

    def load(self, series: Series) -> None:
        kept = self._data.PersistentDataset([{"objects": sorted(series.files)}], self._made, self.place / "cache")
        self._sets[series.ref.series] = kept

    def tensor(self, series: Series) -> Tensor:
        volume: Tensor = self._sets[series.ref.series][0].numpy()
        return volume

    def disk(self) -> Path | None:
        return self.place / "cache"

    def _volume(self, item: dict[str, list[str]]) -> Any:
        return self._torch.from_numpy(volume_of(get_all(self._origin, item["objects"], self.at_once)))
