"""How the walk behaves."""

from typing import Annotated, Literal

import msgspec

from cache.policy.admission import Admission


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the configuration that is the walk's.

    revalidate: when the origin is asked whether a series has changed. "request": before every answer, where
        a listing that is under way already is shared. "interval": in the background, once the last check is older than
        revalidate_s. "events": only after an arrival says so.
    revalidate_s: seconds a manifest is trusted under "interval".
    write_behind: entries that may wait to be written to NVMe; past that an entry stays in RAM only. Of those up to
        64 KiB, such as embeddings, a hundred times as many may wait. Once half as many do, they are written whatever
        else goes on.
    write_behind_patience_s: seconds that an entry lets fills go first before it is written. A crash meanwhile means
        that it has to be made again.
    warm_share: how much of a namespace's RAM warm-ups may take that nobody has used yet; the rest is warmed on NVMe.
    warm_use_s: seconds until what is warmed is expected to be used; what was used more recently than that is not
        evicted for it.
    write_admission: what is written to NVMe at all. "all": whatever was made. "second-use": what had to be made a
        second time; it spares the disk what is read once.
    """

    revalidate: Literal["request", "interval", "events"] = "interval"
    revalidate_s: float = 60.0
    write_behind: int = 16
    write_behind_patience_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    warm_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    warm_use_s: Annotated[float, msgspec.Meta(ge=0)] = 900.0
    write_admission: Admission = "all"
