"""What every test may ask for, where the real DICOM files are, and how Hypothesis looks for examples."""

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says more of the machine's other work than of ours. CI judges a change by the same examples
# each time; other runs look for new ones. `make check` tries a few.
_EXAMPLES = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis.settings.register_profile("voxcache", _EXAMPLES)
hypothesis.settings.register_profile("quick", _EXAMPLES, max_examples=20)
hypothesis.settings.load_profile("voxcache")

pytest_plugins = ["tests.browser", "tests.daemon", "tests.services", "tests.triton_service"]

ROOT = Path(__file__).resolve().parent.parent


def testdata_folder() -> Path | None:
    """The folder of real DICOM series (``VOXCACHE_TESTDATA``), or None on a machine without it."""
    folder = Path(os.environ.get("VOXCACHE_TESTDATA", ROOT.parent / "shared" / "data"))
    return folder if (folder / "dicom" / "INDEX.tsv").is_file() else None


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The real DICOM series. Tests that ask for it are left out, by name, where there are none."""
    folder = testdata_folder()
    assert folder is not None
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if testdata_folder() is None:
        _leave_out(config, items, "testdata", "tests on real DICOM series", "no test data (set VOXCACHE_TESTDATA)")
    if shutil.which("chromium") is None:
        _leave_out(config, items, "browser", "tests in a browser", "no Chromium (Ubuntu packages none but a snap)")


def _leave_out(config: pytest.Config, items: list[pytest.Item], fixture: str, what: str, why: str) -> None:
    """Deselect the tests that ask for ``fixture``, and say so."""
    wanting = [item for item in items if fixture in getattr(item, "fixturenames", ())]
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"{len(wanting)} {what} left out: {why}", yellow=True)
