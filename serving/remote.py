"""The commands that ask a running daemon: what is held and why, what to make ready, what to keep."""

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cache.errors import ConfigError, VoxcacheError

from .progress import Progress, size

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d|w)")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: Seconds that a tensor may take to be made again, behind all other work.
_REMADE_S: Final = 1800.0
#: References in one request: a body of about half a megabyte.
_AT_ONCE: Final = 4000

Commands = Any  # argparse keeps the type of its subparsers to itself
_Run = Callable[[argparse.Namespace], int]


def add_commands(commands: Commands) -> None:
    """Add all of them to the command line."""
    for name, run, told in (
        ("ls", _ls, "what the daemon holds of a study"),
        ("evict", _evict, "drop what nobody holds of a study"),
    ):
        _command(commands, name, run, told).add_argument("study")

    explain = _command(
        commands, "explain", _explain, "what a study calls for and why, what is held of it, made from what"
    )
    explain.add_argument("study")
    explain.add_argument("--json", action="store_true", help="everything, with the lineage of each entry")

    _command(
        commands, "verify", _verify, "make a study's tensors again, and say whether they are what they were"
    ).add_argument("study")

    warm = _command(commands, "warm", _warm, "make entries ready; what is ready is left alone")
    warm.add_argument(
        "reference", nargs="*", metavar="REFERENCE", help="STUDY or STUDY/SERIES, by the plan; or STUDY/SERIES/RECIPE"
    )
    warm.add_argument(
        "--manifest", metavar="FILE|s3://…", help="one reference a line; a file, - or an object of the origin"
    )
    warm.add_argument("--since", type=seconds, metavar="SPAN", help="studies made in the last 24h, 7d, …")
    warm.add_argument("--modality", default="", help="only series of this modality, of those the catalogue knows")
    warm.add_argument("--namespace", default="serving", help="for references with a recipe")
    warm.add_argument("--dry-run", action="store_true", help="say what would be made")
    _follows(warm)

    index = _command(commands, "index", _index, "note all series under a prefix in the catalogue, from headers alone")
    index.add_argument("prefix", nargs="?", default="", metavar="PREFIX|s3://BUCKET/PREFIX")
    _follows(index)

    pin = _command(commands, "pin", _pin, "keep a study on NVMe however full it gets")
    unpin = _command(commands, "unpin", _unpin, "let go of a pin")
    for command in (pin, unpin):
        command.add_argument("study", metavar="STUDY[/SERIES]")
        command.add_argument("--tag", default="", help="as what, such as legal-hold; rules may look at it")
    pin.add_argument("--reason", default="", help="why; no patient data")
    pin.add_argument(
        "--for", dest="span", type=seconds, metavar="SPAN", help="for 30d, say; unless set, until it is unpinned"
    )
    _command(commands, "pins", _pins, "what is pinned, until when, as what and why")

    slow = _command(commands, "slow", _slow, "the slowest requests of the last hour, and where their time went")
    slow.add_argument("--limit", type=int, default=20, help="how many (default: 20)")
    slow.add_argument("--json", action="store_true", help="one object a line")

    letters = _command(commands, "dead-letters", _dead_letters, "arrivals that were tried too often, and why")
    letters.add_argument("id", nargs="*", help="with --requeue: these only")
    letters.add_argument("--requeue", action="store_true", help="have them tried anew")


def seconds(text: str) -> float:
    """Seconds of a span such as ``90s``, ``24h`` or ``7d``."""
    span = _SPAN.fullmatch(text)
    if span is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no span: write 90s, 30m, 24h, 7d or 2w")
    return float(span[1]) * _SECONDS[span[2]]


def _command(commands: Commands, name: str, run: _Run, told: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=told)
    default = os.environ.get("VOXCACHE_URL", "http://127.0.0.1:8600")
    command.add_argument("--url", default=default, help=f"the daemon (VOXCACHE_URL; default: {default})")
    command.set_defaults(run=run)
    return command


def _follows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--detach", action="store_true", help="do not wait for its end")


# ------------------------------------------------------------------ what is held, and why


def _ls(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.url, "GET", f"/v1/studies/{arguments.study}")
    for e in answer["entries"]:
        print(
            f"{e['tier']:5} {e['kind']:9} {e['recipe'] or '-':16} {e['nbytes']:>12} {e['uses']:>6} uses  {e['series']}"
        )
    return 0


def _evict(arguments: argparse.Namespace) -> int:
    print(f"{ask(arguments.url, 'DELETE', f'/v1/studies/{arguments.study}')['evicted']} entries evicted")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    where = f"/v1/studies/{arguments.study}"
    plan = ask(arguments.url, "GET", f"{where}/plan")
    state = ask(arguments.url, "GET", where)
    lineage = ask(arguments.url, "GET", f"{where}/lineage")["entries"] if state["entries"] else []
    if arguments.json:
        print(json.dumps(plan | state | {"lineage": lineage}, indent=2))
        return 0
    print("\n".join(explained(plan, state, lineage)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    where = f"/v1/studies/{arguments.study}"
    tensors = {e["etag"]: e for e in ask(arguments.url, "GET", where)["entries"] if e["kind"] == "tensor"}
    wrong = 0
    for etag, held in tensors.items():
        told = f"{held['recipe']} of {held['series']}, {size(held['nbytes'])}"
        try:
            [entry] = ask(arguments.url, "POST", f"{where}/verify?etag={etag}", timeout_s=_REMADE_S)["entries"]
        except VoxcacheError as error:
            wrong += 1
            print(f"WRONG   {told}: {error}")
        else:
            why = f": {entry['why']}" if entry["why"] else f", in {entry['seconds']:.1f} s"
            print(f"{entry['outcome']:7} {told}{why}")
    if not tensors:
        print(f"no tensor is held of study {arguments.study}")
    return 1 if wrong else 0


def explained(plan: dict[str, Any], state: dict[str, Any], lineage: Sequence[dict[str, Any]] = ()) -> Iterator[str]:
    """The plan of a study, what is held of it, and what that was made from, line by line."""
    arrivals = f", {state['waiting']} arrivals wait" if state["waiting"] else ""
    yield f"study {plan['study']}: {'ready' if state['ready'] else 'not ready'}{arrivals}"
    for series in plan["series"]:
        told = [series[name] for name in ("modality", "body_part", "description", "station") if series[name]]
        yield f"series {series['series']}: {', '.join(told) or 'not described'}; {series['slices']} slices"
        for passed in series["passed"]:
            yield f"  rule {passed['rule']} passed over: {passed['why']}"
        yield f"  rule {series['rule']} decides: {'' if series['fills'] or series['priors'] else 'nothing is made'}"
        for fill in (*series["fills"], *series["priors"]):
            prior = "" if fill["study"] == plan["study"] else f" of {fill['study']}/{fill['series']}"
            held = f"in {fill['tier']}" if fill["tier"] else "not held"
            what = f"{fill['recipe']}{prior} ({fill['namespace']}), priority {fill['priority']}"
            yield f"    {what}: {held}; {fill['why']}"
    for e in state["entries"]:
        pins = f", {e['pins']} pins" if e["pins"] else ""
        yield f"held in {e['tier']}: {e['kind']} {e['recipe'] or '-'} of {e['series']}, {size(e['nbytes'])}{pins}"
    for each in lineage:
        yield from _made(each["entry"], each["manifest"])


def _made(entry: dict[str, Any], manifest: dict[str, Any] | None) -> Iterator[str]:
    """What an entry was made from and by."""
    key, made = entry["key"], entry["lineage"]
    yield f"{key['kind']} {made['recipe_name'] or '-'} of {key['series']}:"
    where = f" on {made['host']}" if made["host"] else ""
    yield f"  made {_day(made['made_at'])}{where} by {made['software']}, in {entry['cost_s']:.2f} s"
    objects = f"{made['objects']} objects, {size(made['source_bytes'])}, version {made['source_version']}"
    yield f"  of {objects}{'' if manifest else ', which are not remembered any more'}"
    if made["recipe"]:
        yield f"  recipe {key['recipe']}: {made['recipe']}"
    if made["decoders"]:
        yield f"  decoders {', '.join(sorted(set(made['decoders'].values())))}"
    if (model := made["model"]) is not None:
        yield f"  model {model['name']} {model['version']}, configuration {model['config']}"


# ------------------------------------------------------------------ what to keep


def _pin(arguments: argparse.Namespace) -> int:
    study, _, series = arguments.study.partition("/")
    body = {"series": series, "tag": arguments.tag, "reason": arguments.reason, "ttl_s": arguments.span}
    ask(arguments.url, "PUT", f"/v1/studies/{study}/pin", body)
    return _pins(arguments)


def _unpin(arguments: argparse.Namespace) -> int:
    study, _, series = arguments.study.partition("/")
    query = urllib.parse.urlencode({"series": series, "tag": arguments.tag})
    with _opened(arguments.url, "DELETE", f"/v1/studies/{study}/pin?{query}"):
        return _pins(arguments)


def _pins(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.url, "GET", "/v1/pins")
    for pin in answer["pins"]:
        until = "for ever" if pin["expires"] is None else f"until {_day(pin['expires'])}"
        print(
            f"{pin['study']}/{pin['series'] or '*'}  {pin['tag'] or '-'}  {_day(pin['since'])} {until}  {pin['reason']}"
        )
    for namespace, nbytes in answer["nbytes"].items():
        print(f"{size(nbytes)} of namespace {namespace} are pinned")
    return 0


def _slow(arguments: argparse.Namespace) -> int:
    for request in ask(arguments.url, "GET", "/v1/stats")["slow"][: arguments.limit]:
        print(json.dumps(request) if arguments.json else told_slow(request))
    return 0


def told_slow(request: dict[str, Any]) -> str:
    """A slow request in two lines: what it was, and its stages, the longest first."""
    stages = sorted(request["stages"].items(), key=lambda stage: -stage[1])
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in stages if ms >= 0.01 * request["ms"])
    of = "".join(f"  {name} {request[name]}" for name in ("study", "trace") if request[name])
    when = datetime.fromtimestamp(request["time"], UTC).strftime("%H:%M:%S UTC")
    return (
        f"{request['ms']:10.1f} ms  {when}  {request['status']}  {request['tier']:6}  {request['route']}{of}\n"
        f"              {parts}"
    )


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ------------------------------------------------------------------ what could not be carried out


def _dead_letters(arguments: argparse.Namespace) -> int:
    if arguments.requeue:
        answer = ask(arguments.url, "POST", "/v1/dead-letters", {"ids": arguments.id or None})
        print(f"{answer['requeued']} arrivals are tried anew")
        return 0
    for letter in ask(arguments.url, "GET", "/v1/dead-letters")["letters"]:
        event = letter["event"]
        what = event.get("key") or f"{event.get('study', '')}/{event.get('series', '')}"
        print(f"{event['id']}  {letter['reason']:16} {event['source']:10} {event['action']:8} {what}")
    return 0


# ------------------------------------------------------------------ what to make ready


def _warm(arguments: argparse.Namespace) -> int:
    bodies = list(_bodies(arguments))
    if not bodies:
        raise ConfigError("warm: name references, --manifest, --since or --modality")
    if arguments.dry_run:
        fills = [fill for body in bodies for fill in ask(arguments.url, "POST", "/v1/plan", body)["fills"]]
        for fill in fills:
            reference = f"{fill['study']}/{fill['series']}/{fill['recipe']}"
            print(f"{fill['tier'] or 'to make':8} {fill['priority']:>4}  {reference}  {fill['why']}")
        print(f"{sum(not fill['tier'] for fill in fills)} of {len(fills)} entries would be made")
        return 0
    return max([_followed(arguments, "/v1/warm", body) for body in bodies])


def _bodies(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The requests that together say what is asked for."""
    references: list[str] = arguments.reference
    listed = arguments.manifest or ""
    if listed and "://" not in listed:
        references = [*references, *_lines(listed)]
        listed = ""
    for some in _batches(references):
        tensors = [reference for reference in some if reference.strip("/").count("/") == 2]
        studies = [reference for reference in some if reference not in tensors]
        yield {"tensors": tensors, "studies": studies, "namespace": arguments.namespace}
    if listed or arguments.since is not None or arguments.modality:
        yield {
            "list": listed,
            "since_s": arguments.since,
            "modality": arguments.modality,
            "namespace": arguments.namespace,
        }


def _batches(references: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(references), _AT_ONCE):
        yield references[first : first + _AT_ONCE]


def _lines(path: str) -> list[str]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _index(arguments: argparse.Namespace) -> int:
    return _followed(arguments, "/v1/index", {"prefix": arguments.prefix})


def _followed(arguments: argparse.Namespace, path: str, body: dict[str, Any]) -> int:
    """Start a job and see it to its end; 1 if something of it failed. Interrupted, the job goes on in the daemon."""
    job = ask(arguments.url, "POST", path, body)
    if arguments.detach:
        print(f"job {job['id']}: GET {arguments.url}/v1/warm/{job['id']} tells how far it is")
        return 0
    progress = Progress(sys.stderr)
    for told in _events(arguments.url, job["id"]):
        job = told
        progress.tell(job)
    for reference, code in sorted(job["failed"].items()):
        print(f"{code}: {reference}")
    if job["error"]:
        print(f"voxcache: the job ended with {job['error']}; the daemon's log says more", file=sys.stderr)
    return 1 if job["error"] or job["failures"] or not job["ended"] else 0


def _events(url: str, job: str) -> Iterator[dict[str, Any]]:
    """The job after each change, until it has ended or the daemon stops."""
    with _opened(url, "GET", f"/v1/warm/{job}/events") as answer:
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


# ------------------------------------------------------------------ asking


def ask(url: str, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> Any:
    """The JSON of one answer. Raises: VoxcacheError."""
    with _opened(url, method, path, body, timeout_s) as answer:
        return json.load(answer)


def _opened(url: str, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310  # the URL is the operator's own
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310
    except urllib.error.HTTPError as error:
        told = json.load(error)
        raise VoxcacheError(f"{told['title']}: {told['detail']}") from error
    except OSError as error:
        raise VoxcacheError(f"no daemon answers at {url}: {error}") from error
