"""Who voxcache is compared with: what one would use instead, each with the settings that its own manual advises.

A peer brings a series' tensor to this process: int16 Hounsfield units, (z, y, x), whole and in memory. Who holds the
objects only leaves the decoding to its caller, as it does in practice; that is part of the time. Objects come over the
fastest client there is (obstore), 32 at a time, and are decoded by a plain pydicom loop into one array.
"""

from .archives import Gateway, Orthanc, OrthancDicomWeb
from .base import Peer
from .monai import Monai
from .mounts import Rclone
from .ours import OverHttp, OverLease
from .proxies import NginxCache, Varnish
from .ready import DiskCache, NginxFiles, RedisTensors

#: In the order of the table: ours, those that hand over the ready tensor, those that hand over objects.
PEERS: tuple[type[Peer], ...] = (
    OverLease,
    OverHttp,
    RedisTensors,
    DiskCache,
    NginxFiles,
    Monai,
    Gateway,
    NginxCache,
    Varnish,
    Rclone,
    Orthanc,
    OrthancDicomWeb,
)

__all__ = ["PEERS", "Peer"]
