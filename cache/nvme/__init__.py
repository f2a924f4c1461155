"""The NVMe tier: one standard file an entry, every byte accounted for before it is written and verified when read."""

from .disk import Disk
from .health import State
from .tier import NvmeSettings, NvmeSpace, NvmeTier, Payload, Report

__all__ = ["Disk", "NvmeSettings", "NvmeSpace", "NvmeTier", "Payload", "Report", "State"]
