"""The key that hashes what identifies patients."""

from pathlib import Path

import pytest

from cache.errors import ConfigError
from serving.app import _patient_key


def test_it_is_made_once(tmp_path: Path) -> None:
    """It is random, readable by the daemon's user only, and the same after a restart."""
    made = _patient_key(tmp_path)
    assert len(made) == 32
    assert _patient_key(tmp_path) == made
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]
    (tmp_path / "other").mkdir()
    assert _patient_key(tmp_path / "other") != made


def test_one_that_is_damaged_is_not_replaced(tmp_path: Path) -> None:
    """With another key nobody's earlier studies would be found: the daemon says so and does not start."""
    (tmp_path / "patient.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="restore"):
        _patient_key(tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        _patient_key(tmp_path / "missing")
