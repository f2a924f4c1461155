"""What a benchmark leaves behind: one document of figures, bars and reasons, from which report and README are made."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from .figures import Bar
from .measures import Track

ROOT: Final = Path(__file__).resolve().parents[1]
_PACKAGES: Final = (
    "aiohttp",
    "uvloop",
    "numpy",
    "pydicom",
    "imagecodecs",
    "aiobotocore",
    "obstore",
    "redis",
    "diskcache",
    "locust",
)
_PROGRAMS: Final = {
    "nginx": ("/usr/sbin/nginx", "-v"),
    "Varnish": ("/usr/sbin/varnishd", "-V"),
    "rclone": ("rclone", "version"),
    "Redis": ("redis-server", "--version"),
    "Orthanc": ("/usr/sbin/Orthanc", "--version"),
}


class Table(msgspec.Struct, frozen=True):
    """Figures in rows; the first column names what the row is of. ``says`` tells how they were taken."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    says: str = ""


class Phase(msgspec.Struct, frozen=True):
    """One run of a load within a scenario."""

    name: str
    tracks: dict[str, Track]
    says: str = ""


class Result(msgspec.Struct, frozen=True):
    """All of one scenario. ``missing``: who could not take part, and why."""

    scenario: str
    says: str
    short: bool
    parameters: dict[str, str | float | int]
    phases: list[Phase] = []
    tables: list[Table] = []
    bars: list[Bar] = []
    notes: list[str] = []
    missing: dict[str, str] = {}
    took_s: float = 0.0


class Machine(msgspec.Struct, frozen=True):
    """Where it ran, and on what."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    disk: str
    versions: dict[str, str]
    load_before: float


class Profile(msgspec.Struct, frozen=True):
    """What the daemon did while it served one kind of load: the flame graph's file, beside the report, and the
    functions themselves with their part of all samples."""

    name: str
    graph: str
    functions: dict[str, float]


class Report(msgspec.Struct, frozen=True):
    """A whole run of benchmarks. ``profiles``: of what missed a bar."""

    date: str
    commit: str
    machine: Machine
    results: list[Result]
    failures: dict[str, str] = {}  # scenarios that gave no result, and why
    profiles: list[Profile] = []

    @property
    def bars(self) -> list[Bar]:
        return [bar for result in self.results for bar in result.bars]


def machine() -> Machine:
    """This machine, as it says itself."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=model[1] if model else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / (1 << 30), 1),
        kernel=platform.release(),
        python=platform.python_version(),
        disk=_filesystem(ROOT),
        versions=versions(),
        load_before=round(os.getloadavg()[0], 2),
    )


def versions() -> dict[str, str]:
    """What takes part, as far as it is installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for name, command in _PROGRAMS.items():
        if shutil.which(command[0]) is not None:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            numbers = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
            found[name] = numbers[0] if numbers else "?"
    return found


def commit() -> str:
    """The commit that was measured, with a + if files were changed since; "" outside of a repository."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return ""
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _filesystem(path: Path) -> str:
    """The type of the filesystem that ``path`` is on."""
    best, kind = "", "?"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if str(path).startswith(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind
