"""What an arrival says, whoever sent it."""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

Action = Literal["created", "changed", "removed", "restored"]


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something was created, changed or removed at the origin, or came back from its archive.

    ``id`` tells repeats of one announcement apart from news: sources that repeat themselves repeat it too. The source
    names an object by its ``key``, and which series it belongs to is found later; or it names the ``series`` of a
    ``study`` itself; or the study alone, or a folder (a key that ends in ``/``), and then all series in it are meant.

    ``expected`` is how many instances the series (or the study, when no series is named) will have in the end;
    ``complete`` says that nothing more will come. ``modality`` is (0008,0060), where it is known. ``time`` is the
    source's own, as it wrote it.
    """

    id: str
    source: str
    action: Action
    key: str = ""
    study: str = ""
    series: str = ""
    modality: str = ""
    expected: int | None = None
    complete: bool = False
    etag: str = ""
    size: int = 0
    version: str = ""
    time: str = ""

    @property
    def names_one(self) -> bool:
        """Whether it is about one object or series, not about all of a study or a folder."""
        return bool(self.series or (self.key and not self.key.endswith("/")))

    @property
    def folder(self) -> str | None:
        """The prefix of the keys that are meant, where it is a folder ("/" is the whole bucket); else None."""
        return self.key.removeprefix("/") if self.key.endswith("/") and not self.study else None


class Taker(Protocol):
    """Whoever takes events over."""

    async def accept(self, events: Sequence[Event]) -> int:
        """How many of the events were new; they are durable when this returns. Raises: Overloaded, QueueDown."""
