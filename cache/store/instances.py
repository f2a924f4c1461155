"""Where one object of a series lies in its pack, found again without looking at all of them."""

from bisect import bisect_left
from collections import OrderedDict
from typing import Final

from cache.errors import NotFound
from cache.keys import Manifest
from cache.origin.find import Finder
from cache.pack import Layout

#: Layouts that are remembered: some 30 bytes for each object of their series.
_MOST: Final = 64
#: A UID has dots; a number of an object has none, and few digits.
_DIGITS: Final = 9


class Instances:
    """The objects of series by name."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._layouts: OrderedDict[str, Layout] = OrderedDict()

    def number(self, manifest: Manifest, name: str) -> int:
        """Which object of the manifest is meant: by its place there, or by what stands for {instance} in its key.

        Raises: NotFound.
        """
        if name.isdecimal() and len(name) <= _DIGITS and int(name) < len(manifest.objects):
            return int(name)
        if (key := self._finder.instance_key(manifest.ref, name)) is not None:
            at = bisect_left(manifest.objects, key, key=lambda source: source.key)
            if at < len(manifest.objects) and manifest.objects[at].key == key:
                return at
        raise NotFound(f"series {manifest.ref.series} has no instance of this name")

    def layout(self, manifest: Manifest) -> Layout:
        """Where all of them lie."""
        layout = self._layouts.get(manifest.source_version)
        if layout is None:
            layout = self._layouts[manifest.source_version] = Layout.of(manifest)
            if len(self._layouts) > _MOST:
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end(manifest.source_version)
        return layout
