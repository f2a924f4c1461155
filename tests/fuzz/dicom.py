"""Ten minutes of objects that nobody would write, by coverage-guided mutation (atheris).

    python -m tests.fuzz.dicom [--seconds 600]
    python -m tests.fuzz.dicom --replay FILE…

A child process does the fuzzing; where it dies or hangs, the object it was at is a finding, and another child goes on.
The corpus grows in .services/fuzz/corpus from run to run; findings are kept, each once, in .services/fuzz/findings.
Progress goes to stderr; the last line on stdout is JSON. Exit status 1 if anything was found.
"""

import argparse
import json
import mmap
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
HOME: Final = ROOT / ".services" / "fuzz"
CORPUS: Final = HOME / "corpus"
SEEDS: Final = HOME / "seeds"
FINDINGS: Final = HOME / "findings"
NEIGHBOURS: Final = HOME / "neighbours"

_LONGEST: Final = 1 << 16
#: Objects tried, and length of the one at hand: what must outlive a child that dies.
_STATE: Final = struct.Struct("<QI")
_EVERY_S: Final = 30.0
#: libFuzzer's exit status after an object that took longer than its timeout.
_HUNG: Final = 70


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="how long to go on")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="only try these objects")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return _child(args.child, args.seconds)
    if args.replay:
        return _replay(args.replay)
    try:
        import atheris  # noqa: F401
    except ImportError:
        _say("atheris is not installed: it has wheels for Linux on x86-64, Python 3.11 to 3.13 (deploy/lock/fuzz.txt)")
        return 2
    return _supervise(args.seconds)


def _supervise(seconds: int) -> int:
    seeds = _prepare()
    before = {path.name for path in FINDINGS.iterdir()}
    state = HOME / "state"
    state.write_bytes(bytes(_STATE.size + _LONGEST))
    began = time.monotonic()
    _say(f"{seeds} seeds, {len(list(CORPUS.iterdir()))} objects in the corpus, {seconds} s")
    with state.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        while (left := round(seconds - (time.monotonic() - began))) > 0:
            tried = _STATE.unpack_from(shared)[0]
            status = _run_child(state, left, began, shared)
            if status != 0:
                now, nbytes = _STATE.unpack_from(shared)
                if now == tried:
                    _say(f"the fuzzer does not start:\n{(HOME / 'log').read_text(errors='backslashreplace')}")
                    return 2
                what = "hung" if status == _HUNG else f"died-{abs(status)}"
                _keep(what, shared[_STATE.size : _STATE.size + nbytes], f"a child ended with status {status}")
        executions = _STATE.unpack_from(shared)[0]
    found = sorted(path for path in FINDINGS.iterdir() if path.name not in before and path.suffix != ".txt")
    for path in found:
        _say(f"found {path.relative_to(ROOT)}\n{path.with_suffix('.txt').read_text()}")
    bar = {"name": "findings", "value": len(found), "bar": 0, "ok": not found}
    result = {
        "executions": executions,
        "seconds": round(time.monotonic() - began, 1),
        "findings": [path.stem for path in found],
        "bars": [bar],
    }
    print(json.dumps(result))
    return 1 if found else 0


def _prepare() -> int:
    """Write seeds and neighbours; the number of seeds."""
    from tests.conftest import testdata_folder

    from . import seeds

    for folder in (CORPUS, SEEDS, FINDINGS, NEIGHBOURS):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as phantoms:
        objects = seeds.synthetic(Path(phantoms)) | seeds.real(testdata_folder())
        beside = seeds.neighbours(Path(phantoms))
    for number, data in enumerate(beside):
        (NEIGHBOURS / str(number)).write_bytes(data)
    for name, data in objects.items():
        (SEEDS / name).write_bytes(data)
    return len(objects)


def _run_child(state: Path, seconds: int, began: float, shared: mmap.mmap) -> int:
    command = [sys.executable, "-m", "tests.fuzz.dicom", "--child", str(state), "--seconds", str(seconds)]
    with (HOME / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while True:
                try:
                    return child.wait(_EVERY_S)
                except subprocess.TimeoutExpired:
                    spent = time.monotonic() - began
                    grown, found = len(list(CORPUS.iterdir())), len(list(FINDINGS.glob("*.txt")))
                    tried = _STATE.unpack_from(shared)[0]
                    _say(f"{spent:4.0f} s  {tried} objects tried, {grown} in the corpus, {found} findings kept")
        finally:
            child.kill()
            child.wait()


def _child(state: Path, seconds: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["cache.dicom", "pydicom"]):
        from .harness import MOST_MEMORY, Harness
    from .mutate import mutated

    harness = Harness([path.read_bytes() for path in sorted(NEIGHBOURS.iterdir())])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file = state.open("r+b")
    shared = mmap.mmap(file.fileno(), 0)

    def try_one(data: bytes) -> None:
        data = data[:_LONGEST]
        shared[: _STATE.size] = _STATE.pack(_STATE.unpack_from(shared)[0] + 1, len(data))
        shared[_STATE.size : _STATE.size + len(data)] = data
        try:
            harness.check(data)
        except Exception as error:
            _keep(_kind(error), data, "".join(traceback.format_exception(error)))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return mutated(bytes(data), seed, lambda part: bytes(atheris.Mutate(part, len(part) + 64)))[:most]

    options = {
        "max_total_time": seconds,
        "max_len": _LONGEST,
        "timeout": 20,
        "rss_limit_mb": 4096,
        "artifact_prefix": f"{HOME}/last-",
        "verbosity": 1,
    }
    atheris.Setup(
        [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(CORPUS), str(SEEDS)],
        try_one,
        custom_mutator=mutate,
    )
    limit = _private_bytes() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    atheris.Fuzz()
    return 0


def _replay(paths: list[Path]) -> int:
    from .harness import Harness

    _prepare()
    harness = Harness([path.read_bytes() for path in sorted(NEIGHBOURS.iterdir())])
    for path in paths:
        made = harness.check(path.read_bytes())
        _say(f"{path.name}: {'something could be made of it' if made else 'refused'}")
    return 0


def _kind(error: BaseException) -> str:
    """Findings of one kind come to the same line of our code last."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    file, line = [at for at in frames if ROOT / "cache" in at[0].parents or ROOT / "tests" in at[0].parents][-1]
    return f"{type(error).__name__}-{file.stem}-{line}"


def _keep(kind: str, data: bytes, why: str) -> None:
    """One of each kind, the first."""
    if not (FINDINGS / f"{kind}.txt").exists():
        (FINDINGS / f"{kind}.dcm").write_bytes(data)
        (FINDINGS / f"{kind}.txt").write_text(why, errors="backslashreplace")


def _private_bytes() -> int:
    fields: Any = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].split()[0]) << 10


def _say(what: str) -> None:
    print(f"fuzz: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
