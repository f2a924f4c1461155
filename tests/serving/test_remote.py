"""What a running daemon is asked from the command line: plans, warm-ups by hand, the index."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.keys import SeriesRef
from serving import cli
from serving.remote import explained, seconds
from tests.daemon import Bucket, Daemon

RULES = [
    {"name": "mr", "modality": ["MR"], "recipes": ["volume"]},
    {"name": "chest", "modality": ["CT"], "description": "CHEST", "recipes": ["volume"], "priority": 3},
]


@pytest.mark.parametrize(("text", "span"), [("90s", 90), ("1.5m", 90), ("24h", 86400), ("7d", 604800), ("2w", 1209600)])
def test_spans(text: str, span: float) -> None:
    """Spans are a number and a unit."""
    assert seconds(text) == span


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1y"])
def test_what_is_no_span(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Anything else is refused with what could be written."""
    with pytest.raises(SystemExit) as left:
        cli.main(["warm", "--since", text])
    assert left.value.code == 2
    assert "span" in capsys.readouterr().err or text == "-1h"


def test_what_explain_says() -> None:
    """Readiness, each series with the rules, what they call for and why, and what is held."""
    fill = {
        "study": "1.2",
        "series": "1.2.1",
        "recipe": "volume",
        "namespace": "serving",
        "priority": 3,
        "why": "rule b",
    }
    prior = fill | {"study": "1.1", "series": "1.1.1", "priority": 50, "why": "rule b: prior of 1.2, 9 days before"}
    series = {
        "series": "1.2.1",
        "modality": "CT",
        "body_part": "",
        "description": "Lung",
        "station": "",
        "slices": 300,
        "rule": "b",
        "passed": [{"rule": "a", "why": "modality 'CT'"}],
        "fills": [fill | {"tier": "ram"}],
        "priors": [prior | {"tier": ""}],
    }
    entry = {"tier": "ram", "kind": "tensor", "recipe": "volume", "series": "1.2.1", "nbytes": 157_000_000, "pins": 1}
    state = {"ready": True, "waiting": 2, "entries": [entry]}
    assert list(explained({"study": "1.2", "series": [series]}, state)) == [
        "study 1.2: ready, 2 arrivals wait",
        "series 1.2.1: CT, Lung; 300 slices",
        "  rule a passed over: modality 'CT'",
        "  rule b decides: ",
        "    volume (serving), priority 3: in ram; rule b",
        "    volume of 1.1/1.1.1 (serving), priority 50: not held; rule b: prior of 1.2, 9 days before",
        "held in ram: tensor volume of 1.2.1, 157.0 MB, 1 pins",
    ]


# ------------------------------------------------------------------ with a daemon


class Command:
    """The command, told where the daemon is."""

    def __init__(self, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
        self.daemon = daemon
        self._capsys = capsys
        self.told = ""

    def __call__(self, name: str, *arguments: str) -> list[str]:
        """Its output, line by line; it ends well, or ``told`` says why not."""
        status = cli.main([name, "--url", self.daemon.url, *arguments])
        captured = self._capsys.readouterr()
        self.told = captured.err
        assert status == 0 or captured.err or captured.out
        return captured.out.splitlines() if status == 0 else [f"exit status {status}", *captured.out.splitlines()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Bucket]]:
    """One daemon for all tests here, each on series of its own."""
    folder = tmp_path_factory.mktemp("remote")
    bucket = Bucket(folder / "bucket")
    table = {"origin": bucket.origin, "store": {"revalidate": "events"}, "plan": {"rules": RULES}}
    with Daemon(folder, table) as daemon:
        yield daemon, bucket


@pytest.fixture
def bucket(shared: tuple[Daemon, Bucket]) -> Bucket:
    return shared[1]


@pytest.fixture
def command(shared: tuple[Daemon, Bucket], capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(shared[0], capsys)


@pytest.mark.service
def test_by_hand(command: Command, bucket: Bucket, tmp_path: Path) -> None:
    """Explained, rehearsed, warmed and warmed again: by study, from a file, and from an object of the origin."""
    one, two = (bucket.series(slices=4, seed=seed) for seed in (11, 12))
    lines = command("explain", one.study)
    assert lines[0] == f"study {one.study}: not ready"
    assert lines[1] == f"series {one.series}: CT, Synthetic chest; 4 slices"
    assert lines[2] == "  rule mr passed over: modality 'CT'"
    assert "volume (serving), priority 3: not held; rule chest" in lines[4]
    assert command("warm", one.study, "--dry-run")[-1] == "1 of 1 entries would be made"
    assert command.daemon.ask("GET", f"/v1/studies/{one.study}").json["ready"] is False
    command("warm", one.study)
    assert "1/1 entries" in command.told
    state = command.daemon.ask("GET", f"/v1/studies/{one.study}").json
    assert (state["ready"], state["planned"], state["missing"]) == (True, 1, [])
    assert command("explain", one.study)[0] == f"study {one.study}: ready"
    listed = tmp_path / "list"
    listed.write_text(f"{one.study}/{one.series}/volume\n\n{two.study}\n")
    assert command("warm", "--manifest", str(listed), "--dry-run")[-1] == "1 of 2 entries would be made"
    (bucket.path / "wanted.txt").write_text(f"{two.study}/{two.series}\n")
    command("warm", "--manifest", str(listed))
    assert "1 were ready" in command.told
    command("warm", "--manifest", "missing://x")
    assert "is not in the origin" in command.told
    answer = command.daemon.ask("POST", "/v1/plan", {"list": "wanted.txt"})
    assert [(fill["series"], bool(fill["tier"])) for fill in answer.json["fills"]] == [(two.series, True)]
    told = json.loads("\n".join(command("explain", two.study, "--json")))
    assert told["lineage"]
    assert command("evict", two.study)
    assert command("ls", one.study)


@pytest.mark.service
def test_what_failed_is_told(command: Command, bucket: Bucket) -> None:
    """The command says what failed, with what, and ends with 1; nothing asked for is an error of the arguments."""
    ref = bucket.series(slices=4, seed=21)
    bucket.files(ref)[1].unlink()
    out = command("warm", f"{ref.study}/{ref.series}/volume", "1.9/1.9.1/volume")
    assert out == [
        "exit status 1",
        f"missing-slice: {ref.study}/{ref.series}/volume",
        "unknown-study: 1.9/1.9.1/volume",
    ]
    good = bucket.series(slices=4, seed=22)
    assert command("warm", "1.9", good.study, "1.9/1.9.2") == [
        "exit status 1",
        "unknown-study: 1.9",
        "unknown-study: 1.9/1.9.2",
    ]
    assert command.daemon.ask("GET", f"/v1/studies/{good.study}").json["ready"]
    assert command("warm", "1.9", "--dry-run") == ["exit status 1"]
    assert command("warm") == ["exit status 2"]
    assert command("warm", "not-a-uid") == ["exit status 1"]
    assert command("explain", "1.9") == ["exit status 1"]
    assert command.daemon.ask("POST", "/v1/warm", {}).status == 400
    assert command.daemon.ask("GET", "/v1/warm/none/events").status == 404


@pytest.mark.service
def test_an_index_and_what_is_found_by_it(command: Command, bucket: Bucket, tmp_path: Path) -> None:
    """Indexed from headers, series are found by modality and time; from manifests alone the catalogue is the same."""
    refs = sorted(bucket.series(slices=3, seed=seed) for seed in range(51, 54))
    command("index", refs[0].study)
    assert "1/1 series" in command.told
    assert command.daemon.ask("GET", f"/v1/studies/{refs[0].study}").json["planned"] == 1
    assert command.daemon.ask("GET", f"/v1/studies/{refs[1].study}").json["planned"] == 0
    command("index")
    plans = [command.daemon.ask("GET", f"/v1/studies/{ref.study}/plan").json for ref in refs]
    found = "\n".join(command("warm", "--modality", "CT", "--dry-run"))
    assert all(ref.series in found for ref in refs)
    assert command("warm", "--since", "24h", "--dry-run") == ["0 of 0 entries would be made"]
    since = "\n".join(command("warm", "--since", "4000w", "--modality", "CT", "--dry-run"))
    assert since == found
    assert command("warm", "--modality", "US", "--dry-run") == ["0 of 0 entries would be made"]
    for ref in refs:
        objects = [{"key": path.relative_to(bucket.path).as_posix()} for path in bucket.files(ref)]
        manifest = {"voxcache_manifest": 1, "study": ref.study, "series": ref.series, "objects": objects}
        (bucket.path / "manifests" / ref.series).mkdir(parents=True)
        (bucket.path / "manifests" / ref.series / f"{ref.study}.json").write_text(json.dumps(manifest))
    (tmp_path / "again").mkdir()
    table = {
        "origin": bucket.origin,
        "find": {"manifest": "manifests/{series}/{study}.json", "template": ""},
        "plan": {"rules": RULES},
    }
    with Daemon(tmp_path / "again", table) as daemon:
        command.daemon = daemon
        command("index", "manifests/")
        assert "3/3 series" in command.told
        assert [daemon.ask("GET", f"/v1/studies/{ref.study}/plan").json for ref in refs] == plans


@pytest.mark.service
def test_events_of_a_job(command: Command, bucket: Bucket) -> None:
    """Server-sent events tell of the job until it has ended; the patient's name is in no answer and no log."""
    ref = bucket.series(slices=4, seed=31)
    job = command.daemon.ask("POST", "/v1/warm", {"studies": [f"{ref.study}/{ref.series}"]})
    assert job.status == 202
    answer = command.daemon.ask("GET", f"{job.headers['Location']}/events")
    assert answer.headers["Content-Type"] == "text/event-stream"
    events = [part.split(b"\n") for part in answer.body.strip().split(b"\n\n")]
    assert events[-1][0] == b"event: ended"
    last = json.loads(events[-1][1].removeprefix(b"data: "))
    assert (last["done"], last["total"], last["failures"], last["ended"]) == (1, 1, 0, True)
    shown = command.daemon.ask("GET", f"/v1/studies/{ref.study}/plan").body + command.daemon.log().encode()
    assert b"PHANTOM" not in shown
    assert b"Phantom" not in shown
    catalogue = (command.daemon.folder / "nvme" / "catalog.sqlite-wal").read_bytes()
    assert b"PHANTOM" not in catalogue
    assert (command.daemon.folder / "state" / "patient.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.service
def test_an_arrival_is_ready_by_the_rules(command: Command, bucket: Bucket) -> None:
    """An event alone makes the study ready; until then it says that something waits, or is missing."""
    ref = bucket.series(slices=4, seed=41)
    announced = {"study": ref.study, "series": ref.series}
    assert command.daemon.ask("POST", "/v1/arrivals/plain", announced).status == 202
    state = command.daemon.ask("GET", f"/v1/studies/{ref.study}").json
    while not state["ready"]:
        state = command.daemon.ask("GET", f"/v1/studies/{ref.study}").json
    assert {(entry["kind"], entry["tier"]) for entry in state["entries"]} >= {("tensor", "ram")}
    assert command.daemon.tensor(SeriesRef(ref.study, ref.series)).headers["Voxcache-Tier"] == "ram"
