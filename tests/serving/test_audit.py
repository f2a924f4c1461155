"""Audit records: what they say, that each is written once, and that whatever becomes of the files is told exactly."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from pydicom.sr._concepts_dict import concepts

from cache.entry import Entry, Lineage
from cache.interfaces import SystemClock
from cache.keys import Key, Manifest, SeriesRef, SourceObject, TensorRef
from serving.audit import ACTS, DAEMON, Act, Agent, Audit, AuditSettings, Spool, State
from serving.audit.record import DCM, EVICT, LEASE, READ, STOP, Said, read, record
from serving.audit.spool import Head, files, read_head
from serving.audit.verify import Kind, Verdict, verify
from tests.conftest import ROOT

KEY = b"k" * 32
REF = SeriesRef("1.2.276.0.7230010.3.1.2.1", "1.2.276.0.7230010.3.1.3.1")
WHO = Agent("http", "dr.who", "127.0.0.1")


def spool(path: Path, **settings: Any) -> Spool:
    return Spool(AuditSettings(**settings), path / "audit", path / "audit.head", KEY, "node-1")


def trail(path: Path, **settings: Any) -> Audit:
    settings = {"flush_s": 0.001} | settings
    made = Audit(AuditSettings(**settings), spool(path, **settings), SystemClock())
    made.start()
    return made


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files(path / "audit") for line in file.read_bytes().splitlines()]


def said(number: int = 0, act: Act = READ) -> Said:
    return Said(act, WHO, f"1.2.3.4.{number}", "", 1e9 + number, 1e9 + number)


def written(path: Path, count: int = 20, **settings: Any) -> Spool:
    """``count`` records, in one batch."""
    made = spool(path, **settings)
    made.open()
    made.commit(made.batch([said(number) for number in range(1, count + 1)]))
    return made


def checked(path: Path, heads: Sequence[Head] = ()) -> Verdict:
    return verify(files(path / "audit"), heads)


def found(verdict: Verdict) -> list[tuple[Kind, int, int]]:
    return [(each.kind, each.first, each.last) for each in verdict.findings]


def edited(path: Path, edit: Callable[[list[bytes]], None]) -> None:
    """The only file with its lines edited."""
    [file] = files(path / "audit")
    lines = file.read_bytes().splitlines(keepends=True)
    edit(lines)
    file.write_bytes(b"".join(lines))


# ------------------------------------------------------------------ what a record says


def test_a_record_is_a_fhir_audit_event() -> None:
    """All that FHIR R4 requires is there; who, what and when can be read from it, and no more than that."""
    manifest = Manifest.of(REF, [SourceObject("bucket/Doe^John.dcm", 1, "e")])
    key = Key.tensor("serving", manifest, "d" * 32)
    lineage = Lineage(manifest.source_version, 1, 1, recipe_name="volume")
    event = json.loads(record(7, "b" * 64, Said(LEASE, WHO, Entry(key, 8, None, lineage), "", 1.0, 2.5, 3), "node-1"))
    assert (event["resourceType"], event["id"], event["action"], event["outcome"]) == ("AuditEvent", "7", "R", "0")
    assert event["type"] == {"system": DCM, "code": "110103", "display": "DICOM Instances Accessed"}
    assert event["recorded"] == "1970-01-01T00:00:02.500Z"
    assert event["period"] == {"start": "1970-01-01T00:00:01.000Z", "end": event["recorded"]}
    [agent] = event["agent"]
    assert agent == {
        "altId": "http",
        "requestor": True,
        "who": {"display": "dr.who"},
        "network": {"address": "127.0.0.1", "type": "2"},
    }
    assert event["source"]["observer"] == {"display": "node-1"}
    [entity] = event["entity"]
    assert entity["what"]["identifier"]["value"] == f"urn:oid:{REF.study}"
    assert {each["type"]: each["valueString"] for each in entity["detail"]} == {
        "series": REF.series,
        "kind": "tensor",
        "recipe": "volume",
        "namespace": "serving",
        "version": manifest.source_version,
        "etag": key.digest,
        "times": "3",
    }
    assert "Doe" not in json.dumps(event)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.name)
def test_codes_are_those_of_dicom(act: Act) -> None:
    """Every event is in CID 400 and every event type in CID 401 of PS3.16, under that name."""
    known = {code: meaning for by_code in concepts["DCM"].values() for code, meaning in by_code.items()}
    for (code, display), context in (((act.code, act.display), 400), (act.also or ("", ""), 401)):
        if code:
            meaning, contexts = known[code]
            assert meaning.lower() == display.lower()
            assert context in contexts


@pytest.mark.parametrize(
    ("what", "study", "details"),
    [
        (TensorRef(REF, "volume"), REF.study, {"series": REF.series, "recipe": "volume", "namespace": "serving"}),
        (REF, REF.study, {"series": REF.series}),
        (REF.study, REF.study, {}),
        (None, "", {}),
    ],
)
def test_whatever_it_was_done_to_is_named(what: Any, study: str, details: dict[str, str]) -> None:
    """An entry that was only asked for, a series, a study, or nothing of a patient's."""
    event = json.loads(record(1, "0" * 64, Said(EVICT, DAEMON, what, "not-found", 1.0, 1.0), "n"))
    entities = event.get("entity", [{}])
    assert entities[0].get("what", {}).get("identifier", {}).get("value", "").removeprefix("urn:oid:") == study
    assert {each["type"]: each["valueString"] for each in entities[0].get("detail", [])} == details
    assert (event["outcome"], event["outcomeDesc"]) == ("4", "not-found")
    assert event["agent"] == [{"altId": "daemon", "requestor": False, "who": {"display": "voxcache"}}]
    assert read(json.dumps(event).encode()) is not None


# ------------------------------------------------------------------ noting and writing


def test_acts_that_are_alike_become_one_record(tmp_path: Path) -> None:
    """Each is counted, once; who did another thing, or another did it, is a record of its own."""
    audit = trail(tmp_path, flush_s=0.2)
    other = Agent("socket", "uid 0")
    wants = [TensorRef(REF, recipe) for recipe in ("volume", "brain")]
    for _ in range(1000):
        audit.note(READ, WHO, wants[0])
    audit.note(READ, other, wants[0])
    audit.note(READ, WHO, wants[1], "not-found")
    audit.close()
    reads = [event for event in told(tmp_path) if event["subtype"][0]["code"] == "read"]
    times = [int(each["valueString"]) for e in reads for each in e["entity"][0]["detail"] if each["type"] == "times"]
    assert sum(times) + sum("times" not in json.dumps(event) for event in reads) == 1002
    assert len({json.dumps([event["agent"], event["entity"][0]["detail"][:2]]) for event in reads}) == 3
    assert checked(tmp_path).whole


def test_a_daemon_records_its_start_and_end(tmp_path: Path) -> None:
    """The next one goes on in the same chain, and knows that the last one ended by itself."""
    trail(tmp_path).close()
    trail(tmp_path).close()
    assert [event["subtype"][0]["code"] for event in told(tmp_path)] == ["start", "stop"] * 2
    assert checked(tmp_path) == Verdict((), 4, 1, 4)


def test_files_are_rotated_and_may_be_taken_away(tmp_path: Path) -> None:
    """A file is named after its first record; the chain goes through all of them, and is not ended by their going."""
    made = spool(tmp_path, file_bytes=1 << 16)
    made.open()
    for start in range(0, 600, 20):
        made.commit(made.batch([said(number) for number in range(start, start + 20)]))
    before = files(tmp_path / "audit")
    assert len(before) > 3
    assert checked(tmp_path).whole
    assert made.nbytes() == sum(path.stat().st_size for path in before)
    for path in before[:-1]:
        path.unlink()
    assert [kind for kind, _, _ in found(checked(tmp_path))] == ["begins"]
    before[-1].unlink()  # even the one that is being written
    made.commit(made.batch([said(600)]))
    head = made.note_head()
    made.close()
    [last] = files(tmp_path / "audit")
    assert last.name == "audit-000000000601.jsonl"
    last.unlink()
    again = spool(tmp_path)
    again.open()
    again.commit(again.batch([said(601)]))
    assert found(checked(tmp_path, [head])) == [("begins", 1, 601)]


def test_acts_that_are_alike_are_one_record(tmp_path: Path) -> None:
    """Each request names its want anew: it is the same want all the same. Who asks, and how it ends, tell apart."""
    audit = trail(tmp_path, flush_s=60.0)
    for _ in range(3):
        audit.note(READ, Agent("http", "", "10.0.0.1"), TensorRef(REF, "volume"), "unknown-study")
    audit.note(READ, Agent("http", "", "10.0.0.2"), TensorRef(REF, "volume"), "unknown-study")
    audit.note(READ, Agent("http", "", "10.0.0.1"), TensorRef(REF, "volume"), "empty-series")
    audit.close()
    reads = [event for event in told(tmp_path) if event["subtype"][0]["code"] == "read"]
    times = [
        {each["type"]: each["valueString"] for each in event["entity"][0]["detail"]}.get("times") for event in reads
    ]
    assert times == ["3", None, None]


class Ending(Audit):
    """Is told to end at the worst moment: the thread has just found that nothing waits."""

    def _write(self) -> bool:
        more = super()._write()
        if not more and not self._ending.is_set():
            self.note(STOP, DAEMON, None)
            self._ending.set()
        return more


def test_the_end_is_recorded_whenever_it_comes(tmp_path: Path) -> None:
    """Or the next start would say that the daemon had crashed."""
    settings = AuditSettings(flush_s=0.001)
    audit = Ending(settings, spool(tmp_path), SystemClock())
    audit.start()
    until(lambda: not audit._thread.is_alive())
    assert [event["subtype"][0]["code"] for event in told(tmp_path)] == ["start", "stop"]


class Refusing(Spool):
    """A spool on a disk that has no room, or is broken, until it is told otherwise."""

    error: OSError | None = None

    def commit(self, batch: Any) -> None:
        if self.error is not None:
            raise self.error
        super().commit(batch)


@pytest.mark.parametrize(("number", "state"), [(errno.ENOSPC, State.FULL), (errno.EIO, State.FAILING)])
def test_what_cannot_be_written_waits_then_is_counted(number: int, state: State, tmp_path: Path) -> None:
    """Whoever notes goes on at once; what waits is written later, and how much was lost is a record itself."""
    settings = AuditSettings(flush_s=0.001, waiting=100)
    made = Refusing(settings, tmp_path / "audit", tmp_path / "audit.head", KEY, "node-1")
    made.error = OSError(number, os.strerror(number))
    audit = Audit(settings, made, SystemClock())
    audit.start()
    until(lambda: audit.state is state)
    for each in range(250):
        audit.note(READ, WHO, f"1.2.3.{each}")
    made.error = None
    until(lambda: audit.state is State.RECORDING)
    audit.close()
    lost = [event for event in told(tmp_path) if event["subtype"][0]["code"] == "lost"]
    count = sum(int(event["entity"][0]["detail"][0]["valueString"]) for event in lost)
    reads = [event for event in told(tmp_path) if event["subtype"][0]["code"] == "read"]
    assert count >= 150 and len(reads) + count == 250
    assert {kind for kind, _, _ in found(checked(tmp_path))} == {"lost"}


def test_records_stay_within_their_budget(tmp_path: Path) -> None:
    """Past it nothing is written, whatever is noted; once files have been taken away it goes on, and says so."""
    audit = trail(tmp_path, budget=8 << 20, file_bytes=1 << 20, waiting=1000)
    number = 0
    while audit.state is not State.FULL:
        audit.note(READ, WHO, f"1.2.{number}")
        number += 1
    for each in range(2000):
        audit.note(READ, WHO, f"1.3.{each}")
    assert sum(path.stat().st_size for path in files(tmp_path / "audit")) <= 8 << 20
    assert audit.backlog > 0 and audit.filled == 1.0
    for path in files(tmp_path / "audit")[:-1]:
        path.unlink()
    until(lambda: audit.state is State.RECORDING)
    audit.close()
    verdict = checked(tmp_path)
    assert verdict.whole and "lost" in [kind for kind, _, _ in found(verdict)]


def until(condition: Callable[[], bool]) -> None:
    """Return once it holds; the test's own time limit ends a wait for what never comes."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)  # a thread or another process brings it about, and tells nobody


# ------------------------------------------------------------------ what becomes of the files


def test_files_as_they_were_written_are_whole(tmp_path: Path) -> None:
    """Nothing is found in them, and every record is counted."""
    made = written(tmp_path)
    assert checked(tmp_path, [made.note_head()]) == Verdict((), 20, 1, 20)


def change(lines: list[bytes], number: int, old: bytes, new: bytes) -> None:
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)


def change_and_remove(lines: list[bytes]) -> None:
    change(lines, 7, b"dr.who", b"dr.no!")
    del lines[12]


CHANGES: dict[str, tuple[Callable[[list[bytes]], None], list[tuple[Kind, int, int]]]] = {
    "a value": (lambda lines: change(lines, 7, b"dr.who", b"dr.no!"), [("changed", 7, 7)]),
    "the first": (lambda lines: change(lines, 1, b"dr.who", b"dr.no!"), [("changed", 1, 1)]),
    "the last": (lambda lines: change(lines, 20, b"dr.who", b"dr.no!"), [("changed", 20, 20)]),
    "its number": (lambda lines: change(lines, 7, b'"id":"7"', b'"id":"9"'), [("changed", 7, 7)]),
    "its number, far away": (lambda lines: change(lines, 7, b'"id":"7"', b'"id":"70"'), [("changed", 7, 7)]),
    "the digest in it": (lambda lines: change(lines, 7, b'"valueString":"', b'"valueString":"f'), [("changed", 7, 7)]),
    "to what is no record": (lambda lines: lines.__setitem__(6, b"\0" * 99 + b"\n"), [("changed", 7, 7)]),
    "one removed": (lambda lines: lines.__delitem__(6), [("missing", 7, 7)]),
    "several removed": (lambda lines: lines.__delitem__(slice(6, 12)), [("missing", 7, 12)]),
    "the end removed": (lambda lines: lines.__delitem__(slice(15, 20)), [("cut", 16, 20)]),
    "the beginning removed": (lambda lines: lines.__delitem__(slice(0, 5)), [("begins", 1, 5)]),
    "one twice": (lambda lines: lines.insert(6, lines[6]), [("added", 7, 7)]),
    "two in another order": (lambda lines: lines.insert(7, lines.pop(6)), [("added", 8, 8), ("missing", 8, 8)]),
    "one changed, another removed": (change_and_remove, [("changed", 7, 7), ("missing", 13, 13)]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_done_to_them_is_told(name: str, tmp_path: Path) -> None:
    """Which record was changed, which are missing, which do not belong there: that, and nothing else."""
    edit, expected = CHANGES[name]
    head = written(tmp_path).note_head()
    edited(tmp_path, edit)
    verdict = checked(tmp_path, [head])
    assert found(verdict) == expected
    assert verdict.whole is (expected[0][0] == "begins")


def test_a_chain_that_was_made_anew_differs_from_its_head(tmp_path: Path) -> None:
    """Whoever writes the files can make all of them anew, but not what was noted elsewhere."""
    head = written(tmp_path).note_head()
    [path] = files(tmp_path / "audit")
    path.unlink()
    forged = spool(tmp_path / "other")
    forged.open()
    forged.commit(forged.batch([said(number + 100) for number in range(20)]))
    path.write_bytes(files(tmp_path / "other" / "audit")[0].read_bytes())
    assert checked(tmp_path).whole
    assert found(checked(tmp_path, [head])) == [("changed", 20, 20)]


def test_a_head_of_somebody_elses_is_not_genuine(tmp_path: Path) -> None:
    """It is sealed with a key of this installation."""
    made = written(tmp_path)
    made.note_head()
    head = read_head(tmp_path / "audit.head")
    assert head is not None and head.genuine(KEY) and not head.genuine(b"x" * 32)
    assert not Head(head.record + 1, head.digest, head.seal).genuine(KEY)


@pytest.mark.parametrize("cut", [1, 30, 5000])
def test_a_torn_end_is_gone_on_from(cut: int, tmp_path: Path) -> None:
    """What a crash left of the last batch stays as it is; the next start says so, and the chain goes on."""
    written(tmp_path)
    [path] = files(tmp_path / "audit")
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    torn = [("torn", 0, 0)] if cut > 1 else []
    assert found(checked(tmp_path)) == torn
    audit = trail(tmp_path)
    audit.close()
    verdict = checked(tmp_path)
    kinds = [kind for kind, _, _ in found(verdict)]
    assert kinds == (["torn", "unclean"] if cut > 1 else ["unclean"])
    assert verdict.whole
    assert path.read_bytes().startswith(data[:-cut])
    # a change before it shows all the same
    edited(tmp_path, lambda lines: change(lines, 3, b"dr.who", b"dr.no!"))
    assert found(checked(tmp_path))[0] == ("changed", 3, 3)


def test_records_that_were_cut_off_while_nobody_looked_are_missed(tmp_path: Path) -> None:
    """A crash tears what was written last; what is missing from before the head, a crash has not taken."""
    audit = trail(tmp_path)
    audit.note(READ, WHO, REF)
    audit.close()
    edited(tmp_path, lambda lines: lines.__delitem__(slice(1, 3)))
    audit = trail(tmp_path)
    audit.close()
    assert ("missing", 2, 3) in found(checked(tmp_path))
    assert told(tmp_path)[1]["entity"][0]["detail"][-1] == {"type": "missing", "valueString": "2-3"}


# ------------------------------------------------------------------ at full length

WRITER = """
import signal
import sys
import time
from pathlib import Path
from cache.interfaces import SystemClock
from serving.audit import Agent, Audit, AuditSettings, Spool
from serving.audit.record import READ
path, first, count, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
settings = AuditSettings(flush_s=0.001, file_bytes=8 << 20, head_s=0.2, waiting=1 << 20)
audit = Audit(settings, Spool(settings, path / "audit", path / "audit.head", b"k" * 32, "node-1"), SystemClock())
audit.start()
print("writes", flush=True)
who = Agent("http", "", "127.0.0.1")
for number in range(first, first + count):
    audit.note(READ, who, f"1.2.3.{number}")
if end == "killed":
    signal.pause()
while audit.backlog:  # its end would wait for some seconds only
    time.sleep(0.01)  # its writer is a thread, which tells nobody
audit.close()
"""


def writer(path: Path, first: int, count: int, end: Literal["closed", "killed"]) -> "subprocess.Popen[bytes]":
    """A process that notes so many acts, and then ends or waits for its end."""
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count), end]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.slow
def test_among_100_000_records_exactly_what_was_done_is_found(tmp_path: Path) -> None:
    """One was changed, one removed, and the process that wrote them killed in between: that is found, and no more."""
    # too few for 90 000, however late we come, and more than enough for as many bytes
    with writer(tmp_path, 0, 80_000, "killed") as process:
        until(lambda: sum(path.stat().st_size for path in files(tmp_path / "audit")) > 15 << 20)
        process.send_signal(signal.SIGKILL)
    [*_, last] = files(tmp_path / "audit")
    with last.open("r+b") as file:  # the kernel ends a write between pages: have the line be torn in any case
        file.truncate(last.stat().st_size - 100)
    verdict = checked(tmp_path)
    survived = verdict.last
    assert 10_000 < survived < 90_000
    assert found(verdict) == [("torn", 0, 0)]
    with writer(tmp_path, 1_000_000, 100_000 - survived, "closed") as process:
        assert process.wait(120) == 0

    head = read_head(tmp_path / "audit.head")
    assert head is not None and head.genuine(KEY)
    verdict = checked(tmp_path, [head])
    assert verdict.records == verdict.last == head.record == 100_002  # with a start and an end
    crash = [("torn", survived + 1, survived + 1), ("unclean", survived + 1, survived + 1)]
    assert found(verdict) == crash and verdict.whole

    changed, removed = survived // 2, survived + (100_000 - survived) // 2
    at = {number: place(tmp_path, number) for number in (changed, removed)}
    for number, (path, line) in at.items():
        lines = path.read_bytes().splitlines(keepends=True)
        lines[line - 1] = lines[line - 1].replace(b'"R"', b'"U"', 1) if number == changed else b""
        path.write_bytes(b"".join(lines))
    verdict = checked(tmp_path, [head])
    assert found(verdict) == [("changed", changed, changed), *crash, ("missing", removed, removed)]
    assert not verdict.whole
    first, *_, last_finding = verdict.findings
    assert (first.path, first.line) == at[changed]
    assert (last_finding.path, last_finding.line) == at[removed]  # what stands there now comes after it


def place(path: Path, number: int) -> tuple[Path, int]:
    """The file and line of a record."""
    for file in files(path / "audit"):
        for line, raw in enumerate(file.read_bytes().splitlines(), 1):
            if (found := read(raw)) is not None and found.number == number:
                return file, line
    raise AssertionError(number)
