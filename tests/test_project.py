"""The project's own promises: its arrows hold, its locks are complete and portable, its errors are all told apart."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import cache
import voxcache_client
from cache.errors import VoxcacheError, every_error

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "deploy" / "lock").glob("*.txt"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    """Distribution names, normalised as the package index does it."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", each)[0]).lower() for each in requirements}


def locked(lock: str) -> set[str]:
    lines = (ROOT / "deploy" / "lock" / lock).read_text().splitlines()
    return names([line for line in lines if re.match(r"[A-Za-z0-9]", line)])


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("cache/ram.py", "import cache.nvme", "tiers never know each other"),
        ("cache/keys.py", "import serving", "serving stands on cache, never the other way"),
        ("cache/store/walk.py", "import tritonclient", "cache speaks no protocol"),
        ("cache/store/walk.py", "import aiohttp", "HTTP enters cache through the S3 origin alone"),
        ("cache/flight.py", "import cache.store", "the walk goes one way"),
        ("cache/store/behind.py", "import cache.store.places", "the store's parts go one way too"),
        ("cache/entry.py", "import time", "pure rooms do no I/O and read no clock"),
        ("serving/plan.py", "import sqlite3", "pure rooms do no I/O and read no clock"),
        ("cache/keys.py", "import pydicom", "pydicom stays in cache.dicom"),
        ("serving/references.py", "import cache.store", "Triton's rooms and both its doors know no store"),
        ("serving/triton.py", "import grpc", "gRPC is spoken in its room alone"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, module: str, statement: str, contract: str) -> None:
    """Each arrow of the design is enforced: an import planted against it fails the check, by name."""
    for part in ("cache", "serving"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{statement}\n")
    checked = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert re.search(rf"^{re.escape(contract)}.* BROKEN", checked.stdout, re.MULTILINE), checked.stdout
    planted = f"{module.removesuffix('.py').replace('/', '.')} -> {statement.removeprefix('import ')} (l."
    assert planted in checked.stdout, checked.stdout


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_pin_by_hash_and_name_no_host(lock: Path) -> None:
    """They install from whatever index a site has: every line is a pinned name, a hash or a remark."""
    allowed = re.compile(
        r"#.*|[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?"
    )
    wrong = [line for line in lock.read_text().splitlines() if line and not allowed.fullmatch(line)]
    assert not wrong
    assert "://" not in lock.read_text()
    assert "file:" not in lock.read_text()


def test_locks_hold_all_that_is_declared() -> None:
    """A dependency added to the project without `make lock` is noticed."""
    table = project()
    runtime = names(table["project"]["dependencies"])
    groups = {name: names(group) for name, group in table["dependency-groups"].items()}
    assert runtime <= locked("run.txt")
    assert groups.pop("fuzz") == locked("fuzz.txt")
    assert runtime.union(*groups.values()) <= locked("dev.txt")


def test_production_needs_no_test_tools() -> None:
    """The lock that is deployed holds what the daemon runs, no more."""
    groups = project()["dependency-groups"]
    tools = names(groups["test"] + groups["lint"] + groups["bench"]) - names(project()["project"]["dependencies"])
    assert not tools & locked("run.txt")


def test_daemon_and_client_share_a_version() -> None:
    """They are released together, and the changelog tells of that version or of what comes next."""
    assert cache.__version__ == voxcache_client.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[?([^\]\s]+)", changelog, re.MULTILINE)[0] in ("Unreleased", cache.__version__)


def test_the_client_needs_numpy_only() -> None:
    """It is installed beside other people's models: one dependency, and none of the daemon's modules."""
    table = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())
    assert names(table["project"]["dependencies"]) == {"numpy"}
    code = (
        "import sys, voxcache_client; print(*sorted({name.split('.')[0] for name in sys.modules} "
        "- sys.stdlib_module_names - {'voxcache_client', 'numpy', '__main__', '__mp_main__'}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {[str(ROOT / 'client'), *numpy_folder()]!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.split() == []


def numpy_folder() -> list[str]:
    found = importlib.import_module("numpy").__file__
    assert found is not None
    return [str(Path(found).parent.parent)]


def test_every_error_has_a_code_of_its_own() -> None:
    """Codes end problem types: two errors with one code could not be told apart by a client."""
    codes = [error.code for error in every_error()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    """The drawing on top of cache/errors.py shows every class below its parent, and nothing else."""
    module = importlib.import_module("cache.errors")
    lines = (module.__doc__ or "").splitlines()
    branch = re.compile(r" {4}([│ ├└─]*)([A-Z]\w+)")
    drawn = [(len(found[1]) // 4, found[2]) for found in map(branch.match, lines) if found]

    def branches(error: type[VoxcacheError], depth: int = 0) -> list[tuple[int, str]]:
        return [(depth, error.__name__), *(b for child in error.__subclasses__() for b in branches(child, depth + 1))]

    ours = [b for b in branches(VoxcacheError) if getattr(module, b[1], None) is not None]
    assert drawn == ours
