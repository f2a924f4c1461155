"""What a record says: a FHIR AuditEvent with DICOM's audit codes, one a line, each with the digest of the one before.

Sources: DICOM PS3.15 §A.5 (which messages there are, and what they hold), PS3.16 CID 400, 401 and 404 (their codes);
HL7 FHIR R4, resource AuditEvent.
"""

import hashlib
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from cache.entry import Entry
from cache.keys import SeriesRef, TensorRef

DCM: Final = "http://dicom.nema.org/resources/ontology/DCM"
#: Our own names for acts, and of the extension that holds the digest of the record before.
OURS: Final = "urn:voxcache:audit"
BEFORE: Final = "urn:voxcache:audit:before"

#: The digest before the first record.
NOTHING: Final = "0" * 64

_HL7: Final = "http://terminology.hl7.org/CodeSystem"


class Act(msgspec.Struct, frozen=True):
    """Something that is recorded: its name, DICOM's event (CID 400) and, perhaps, event type (CID 401).

    ``action``: FHIR's: C create, R read, U update, D delete, E execute. ``says``: when it is recorded, for people.
    """

    name: str
    code: str
    display: str
    action: str
    says: str
    also: tuple[str, str] | None = None


_ACCESSED: Final = ("110103", "DICOM Instances Accessed")
_ACTIVITY: Final = ("110100", "Application Activity")
_ALERT: Final = ("110113", "Security Alert")

START: Final = Act(
    "start",
    *_ACTIVITY,
    "E",
    "The daemon has started, and how the records before it end.",
    ("110120", "Application Start"),
)
STOP: Final = Act(
    "stop", *_ACTIVITY, "E", "The daemon stops: the record before a start.", ("110121", "Application Stop")
)
READ: Final = Act("read", "110106", "Export", "R", "A tensor's bytes went out over HTTP.")
INSTANCE: Final = Act("instance", "110106", "Export", "R", "An original object's bytes went out over HTTP.")
LEASE: Final = Act("lease", *_ACCESSED, "R", "A tensor was leased in shared memory, over HTTP or the socket.")
INFER: Final = Act("infer", *_ACCESSED, "R", "A model was given a tensor by reference.")
ANSWER: Final = Act("answer", *_ACCESSED, "R", "What a model had answered about a tensor before was given again.")
QUERY: Final = Act("query", "110112", "Query", "E", "Embeddings near another, or near a vector, were asked for.")
WARM: Final = Act("warm", *_ACCESSED, "C", "An entry was made ready before it was asked for.")
ANNOUNCE: Final = Act(
    "announce", "110102", "Begin Transferring DICOM Instances", "E", "An arrival was accepted, which will be warmed."
)
INDEX: Final = Act("index", *_ACCESSED, "R", "Headers under a prefix were read into the catalogue.")
REQUEUE: Final = Act("requeue", *_ACTIVITY, "E", "Dead letters were tried anew.")
PIN: Final = Act("pin", *_ACCESSED, "U", "A study was pinned.")
UNPIN: Final = Act("unpin", *_ACCESSED, "U", "A pin was let go, or its time was over.")
EVICT: Final = Act(
    "evict", "110105", "DICOM Study Deleted", "D", "What was held of a study was dropped because somebody asked."
)
DROP: Final = Act(
    "drop", *_ACCESSED, "D", "An entry was dropped: a series of a study by request, or by a retention rule."
)
VERIFY: Final = Act("verify", *_ACCESSED, "E", "An entry was made again and compared.")
QUARANTINE: Final = Act("quarantine", *_ACCESSED, "D", "An entry was set aside: made again, it had other bytes.")
REFUSE: Final = Act(
    "refuse",
    *_ALERT,
    "E",
    "An arrival did not show that it knew the source's secret.",
    ("110126", "Node Authentication"),
)
DIVIDE: Final = Act(
    "divide", *_ALERT, "U", "The tiers were divided anew (SIGHUP).", ("110131", "Software Configuration")
)
LOST: Final = Act(
    "lost", *_ALERT, "E", "So many acts could not be recorded, in that period.", ("110133", "Audit Recording Stopped")
)

ACTS: Final = (
    *(START, STOP, READ, INSTANCE, LEASE, INFER, ANSWER, QUERY, WARM, ANNOUNCE, INDEX, REQUEUE, PIN, UNPIN),
    *(EVICT, DROP, VERIFY, QUARANTINE, REFUSE, DIVIDE, LOST),
)


class Agent(msgspec.Struct, frozen=True):
    """Who did it: the way they came, the name that is known of them ("" for none), and the network address."""

    via: str  # "http", "grpc", "socket", "arrival", "daemon"
    name: str = ""
    address: str = ""


#: The daemon itself, by its settings.
DAEMON: Final = Agent("daemon", "voxcache")

#: What it was done to: an entry, the entry or series somebody asked for, a study, or nothing of that kind.
What = Entry | TensorRef | SeriesRef | str | None

Details = tuple[tuple[str, str], ...]


class Said(msgspec.Struct, frozen=True):
    """One act, or ``times`` alike from ``first`` to ``last`` (Unix seconds), as it goes into a record.

    ``failed``: the code of the error it ended with, "" for none.
    """

    act: Act
    agent: Agent
    what: What
    failed: str
    first: float
    last: float
    times: int = 1
    details: Details = ()


def digest(line: bytes) -> str:
    """What the next record holds of this one, given without its line end: SHA-256 in hex."""
    return hashlib.sha256(line).hexdigest()


def record(number: int, before: str, said: Said, node: str) -> bytes:
    """The line of one record, without its end. ``number`` counts from 1; ``before``: the digest of the line before."""
    act, agent = said.act, said.agent
    told: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": str(number),
        "extension": [{"url": BEFORE, "valueString": before}],
        "type": {"system": DCM, "code": act.code, "display": act.display},
        "subtype": [{"system": OURS, "code": act.name}, *([_dcm(*act.also)] if act.also else [])],
        "action": act.action,
        "recorded": _instant(said.last),
        "outcome": "4" if said.failed else "0",
        "agent": [_agent(agent)],
        "source": {
            "observer": {"display": node},
            "type": [{"system": f"{_HL7}/security-source-type", "code": "4", "display": "Application Server"}],
        },
    }
    if said.failed:
        told["outcomeDesc"] = said.failed
    if said.times > 1 or said.first != said.last:
        told["period"] = {"start": _instant(said.first), "end": _instant(said.last)}
    study, details = _of(said.what)
    details = [*details, *said.details, *((("times", str(said.times)),) if said.times > 1 else ())]
    if study or details:
        told["entity"] = [_entity(study, details)]
    return msgspec.json.encode(told)


class Read(msgspec.Struct, frozen=True):
    """What a record that was read says of its place in the chain and of the chain itself."""

    number: int
    before: str
    act: str
    details: dict[str, str]
    recorded: str


class _Extension(msgspec.Struct, frozen=True):
    url: str
    valueString: str  # noqa: N815 - FHIR's name


class _Detail(msgspec.Struct, frozen=True):
    type: str
    valueString: str  # noqa: N815 - FHIR's name


class _Entity(msgspec.Struct, frozen=True):
    detail: tuple[_Detail, ...] = ()


class _Coding(msgspec.Struct, frozen=True):
    code: str


class _Line(msgspec.Struct, frozen=True):
    id: str
    extension: tuple[_Extension, ...]
    subtype: tuple[_Coding, ...]
    recorded: str
    entity: tuple[_Entity, ...] = ()


_lines: Final = msgspec.json.Decoder(_Line)


def read(line: bytes) -> Read | None:
    """A line's record; None if it is none."""
    try:
        told = _lines.decode(line)
        details = {each.type: each.valueString for entity in told.entity for each in entity.detail}
        return Read(int(told.id), told.extension[0].valueString, told.subtype[0].code, details, told.recorded)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, IndexError):
        return None


def acts_table() -> str:
    """Every act as a Markdown table, with DICOM's codes."""
    lines = ["| act | DICOM event | FHIR action | recorded when |", "|---|---|---|---|"]
    for act in ACTS:
        codes = ", ".join(" ".join(code) for code in ((act.code, act.display), act.also) if code)
        lines.append(f"| `{act.name}` | {codes} | {act.action} | {act.says} |")
    return "\n".join(lines) + "\n"


def _dcm(code: str, display: str) -> dict[str, str]:
    return {"system": DCM, "code": code, "display": display}


def _instant(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _agent(agent: Agent) -> dict[str, Any]:
    told: dict[str, Any] = {"altId": agent.via, "requestor": agent.via != "daemon"}
    if agent.name:
        told["who"] = {"display": agent.name}
    if agent.address:
        told["network"] = {"address": agent.address, "type": "2"}  # an IP address
    return told


def _of(what: What) -> tuple[str, list[tuple[str, str]]]:
    """The study, and the rest of what is known of it."""
    match what:
        case Entry(key=key, lineage=lineage):
            told = [("series", key.series), ("kind", key.kind), ("recipe", lineage.recipe_name)]
            told += [("namespace", key.namespace), ("version", key.source_version), ("etag", key.digest)]
            return key.study, [(name, value) for name, value in told if value]
        case TensorRef(ref=ref, recipe=recipe, namespace=namespace):
            return ref.study, [("series", ref.series), ("recipe", recipe), ("namespace", namespace)]
        case SeriesRef(study=study, series=series):
            return study, [("series", series)] if series else []
        case str():
            return what, []
        case _:
            return "", []


def _entity(study: str, details: list[tuple[str, str]]) -> dict[str, Any]:
    told: dict[str, Any] = {"type": {"system": f"{_HL7}/audit-entity-type", "code": "2", "display": "System Object"}}
    if study:
        kind = {"coding": [_dcm("110180", "Study Instance UID")]}
        told["what"] = {"identifier": {"type": kind, "system": "urn:dicom:uid", "value": f"urn:oid:{study}"}}
        told["role"] = {"system": f"{_HL7}/object-role", "code": "3", "display": "Report"}
    if details:
        told["detail"] = [{"type": name, "valueString": value} for name, value in details]
    return told
