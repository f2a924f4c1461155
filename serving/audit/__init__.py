"""Who read, warmed, pinned, evicted or changed what: records in files that are only ever appended to.

Whoever does something notes it, which takes a fraction of a microsecond; a thread of its own makes records of what was
noted and writes them. UIDs are in full, or nobody could tell what was read; patient data never.
"""

from .agents import Agents
from .record import ACTS, DAEMON, Act, Agent, acts_table
from .spool import AuditSettings, Spool, State
from .trail import SILENT, Audit, Auditor, Silent, failing

__all__ = [
    "ACTS",
    "DAEMON",
    "SILENT",
    "Act",
    "Agent",
    "Agents",
    "Audit",
    "AuditSettings",
    "Auditor",
    "Silent",
    "Spool",
    "State",
    "acts_table",
    "failing",
]
