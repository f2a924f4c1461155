"""Settings: what is written is what is meant, and what cannot work is refused by name before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from cache.errors import ConfigError
from serving.cli import main
from serving.config import Settings, from_table, load, merged

MINIMAL: dict[str, Any] = {
    "ram": {"budget": "64 MiB"},
    "nvme": {"path": "/nvme", "budget": "2 GiB"},
    "origin": {"directory": {"path": "/archive"}},
}

TOML = """
[ram]
budget = "64 MiB"
namespaces = { serving = 0.7, staging = 0.2, trial = 0.1 }

[nvme]
path = "/nvme"
budget = 2_000_000_000

[origin.s3]
bucket = "archive"
endpoint_url = "http://127.0.0.1:9000"

[arrivals]
warm = ["ct"]
quiet_s = 30

[triton.models.lung]
recipe = "ct"

[recipes.ct]
version = 1
ops = [{ op = "volume" }, { op = "cast", dtype = "float16" }]
"""


def with_(**sections: Any) -> Settings:
    """The least settings there can be, with other ones in place of these sections."""
    return from_table(MINIMAL | sections, "voxcache.toml")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "voxcache.toml"
    path.write_text(TOML)
    return path


def test_a_file_is_read(file: Path) -> None:
    """Each section becomes its room's settings; what is not written has its default."""
    settings = load(file, {})
    assert settings.ram.budget == 64 << 20
    assert settings.ram.namespaces == {"serving": 0.7, "staging": 0.2, "trial": 0.1}
    assert settings.nvme.budget == 2_000_000_000
    assert settings.origin.directory is None
    assert settings.origin.s3 is not None
    assert settings.origin.s3.bucket == "archive"
    assert settings.arrivals.warm == ("ct",)
    assert settings.arrivals.quiet_s == 30.0
    assert settings.triton.virtual("lung").recipe == "ct"
    assert settings.server.port == 8600
    assert settings.server.host == "127.0.0.1"
    assert [op.name for op in settings.parsed_recipes()["ct"].ops] == ["volume", "cast"]


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (4096, 4096),
        ("4096 B", 4096),
        ("10 kB", 10_000),
        ("10 kiB", 10_240),
        ("1MiB", 1 << 20),
        ("1.5 GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
        ("0.5 TiB", 1 << 39),
    ],
)
def test_sizes(written: object, nbytes: int) -> None:
    """Sizes are bytes, or numbers with a unit: powers of ten, and of two with an i."""
    assert with_(ram={"budget": written}).ram.budget == nbytes


@pytest.mark.parametrize("written", ["much", "10 XB", "-1 MiB", "1,5 GiB", "10 KB", ""])
def test_sizes_that_are_none(written: str) -> None:
    """Anything else is refused, and the setting is named."""
    with pytest.raises(ConfigError, match=r"voxcache\.toml: .*ram\.budget"):
        with_(ram={"budget": written})


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"ram": {"budget": 1, "size": 2}}, r"unknown field `size`.*ram"),
        ({"rams": {}}, r"unknown field `rams`"),
        ({"ram": {}}, r"missing required field `budget`.*ram"),
        ({"server": {"port": "http"}}, r"Expected `int`.*server\.port"),
        ({"store": {"revalidate": "sometimes"}}, r"'sometimes'.*store\.revalidate"),
        ({"workers": {"count": -1}}, r">= 0.*workers\.count"),
        ({"arrivals": {"warm": "ct"}}, r"Expected `array`.*arrivals\.warm"),
        ({"origin": {}}, r"one origin, \[origin\.directory\] or \[origin\.s3\]"),
        ({"origin": {"directory": {"path": "/a"}, "s3": {"bucket": "b"}}}, r"one origin"),
        ({"triton": {"models": {"lung": {"recipe": "ct"}}}}, r"triton\.models\.lung names the recipe 'ct'"),
        ({"arrivals": {"warm": ["mr"]}}, r"arrivals\.warm names the recipe 'mr'"),
        ({"recipes": {"ct": {"version": 1, "ops": [{"op": "volumes"}]}}}, r"recipe 'ct', op 1: 'volumes' is none of"),
        ({"recipes": {"ct": {"version": 1, "ops": []}}}, r"recipe 'ct': its first op"),
        ({"ram": {"budget": 1, "namespaces": {"a": 0.7, "b": 0.7}}}, r"ram\.namespaces: .*more than the budget"),
        (
            {"webhooks": {"secrets": {"pigeon": {"bearer": "t"}}}},
            r"webhooks\.secrets names the source 'pigeon'; known: plain",
        ),
        ({"webhooks": {"secrets": {"s3": {"beaver": "t"}}}}, r"unknown field `beaver`.*webhooks\.secrets"),
        ({"pull": {"orthanc": {"interval_s": 0}}}, r"> 0.*pull\.orthanc\.interval_s"),
        ({"restore": {"tier": "Slow"}}, r"'Slow'.*restore\.tier"),
        ({"restore": {"days": 0}}, r">= 1.*restore\.days"),
        ({"nvme": {"path": "/n", "budget": 1, "namespaces": {}}}, r"nvme\.namespaces: no namespace"),
    ],
)
def test_what_cannot_work_is_named(table: dict[str, Any], told: str) -> None:
    """An unknown, missing or wrong setting is refused by a message that says which, and where it was read."""
    with pytest.raises(ConfigError, match=told):
        with_(**table)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, and one that is no TOML, are told by name."""
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        load(tmp_path / "none.toml", {})
    (tmp_path / "odd.toml").write_text("[ram\nbudget = 5")
    with pytest.raises(ConfigError, match=r"odd\.toml is not TOML"):
        load(tmp_path / "odd.toml", {})


def test_the_environment_wins(file: Path) -> None:
    """Variables override the file, section by section; bare words, numbers, sizes, lists and truths are understood."""
    environment = {
        "VOXCACHE_RAM__BUDGET": "8 GiB",
        "VOXCACHE_RAM__NAMESPACES__TRIAL": "0.05",
        "VOXCACHE_SERVER__PORT": "0",
        "VOXCACHE_NVME__DIRECT": "false",
        "VOXCACHE_ORIGIN__S3__SECRET_KEY": "wJalr/XUtnFEMI+K7MDENG=",
        "VOXCACHE_ARRIVALS__WARM": "[]",
        "VOXCACHE_STORE__REVALIDATE": '"events"',
        "VOXCACHE_LOG__LEVEL": "debug",
        "VOXCACHE_URL": "http://no.section",
        "HOME": "/home/somebody",
    }
    settings = load(file, environment)
    assert settings.ram.budget == 8 << 30
    assert settings.ram.namespaces == {"serving": 0.7, "staging": 0.2, "trial": 0.05}
    assert settings.server.port == 0
    assert settings.nvme.direct is False
    assert settings.origin.s3 is not None
    assert settings.origin.s3.secret_key == "wJalr/XUtnFEMI+K7MDENG="
    assert settings.origin.s3.bucket == "archive"
    assert settings.arrivals.warm == ()
    assert settings.store.revalidate == "events"
    assert settings.log.level == "debug"


def test_variables_that_cannot_work(file: Path) -> None:
    """A variable for what does not exist is refused like a setting; one through a plain setting, by its own name."""
    with pytest.raises(ConfigError, match="unknown field `colour`"):
        load(file, {"VOXCACHE_RAM__COLOUR": "red"})
    with pytest.raises(ConfigError, match="VOXCACHE_RAM__BUDGET__MOST: budget is no section"):
        load(file, {"VOXCACHE_RAM__BUDGET__MOST": "1"})


def test_merging_leaves_its_input_alone() -> None:
    """The table that variables are laid over stays as it was."""
    table = {"ram": {"budget": 1}}
    assert merged(table, {"VOXCACHE_RAM__BUDGET": "2"}) == {"ram": {"budget": 2}}
    assert table == {"ram": {"budget": 1}}


def test_check_config(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A right file is described and ends with 0; a wrong one, by the command or a variable, with 2 and the reason."""
    assert main(["check-config", "--config", str(file)]) == 0
    told = capsys.readouterr()
    assert "right. Origin: a bucket; recipes: ct" in told.out
    assert told.err == ""
    monkeypatch.setenv("VOXCACHE_SERVER__PORT", "here")
    assert main(["check-config", "--config", str(file)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"voxcache: {file}: ")
    assert "server.port" in told.err
    assert main(["check-config", "--config", str(file.with_name("none.toml"))]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_secrets_are_not_told(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a description of right settings nor a complaint about wrong ones holds a secret."""
    monkeypatch.setenv("VOXCACHE_ORIGIN__S3__SECRET_KEY", "hunter2")
    assert main(["check-config", "--config", str(file)]) == 0
    for secret in ("WEBHOOKS__SECRETS__S3__BEARER", "WEBHOOKS__SECRETS__S3__HMAC", "PULL__ORTHANC__PASSWORD"):
        monkeypatch.setenv(f"VOXCACHE_{secret}", "hunter2")
    assert main(["check-config", "--config", str(file)]) == 0
    monkeypatch.setenv("VOXCACHE_ORIGIN__S3__COLOUR", "red")
    assert main(["check-config", "--config", str(file)]) == 2
    told = capsys.readouterr()
    assert "hunter2" not in told.out + told.err
