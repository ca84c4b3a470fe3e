"""Settings: from the environment or given, validated once, and errors that name the setting."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from longshift import config
from longshift.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in config.Config.model_fields:
        monkeypatch.delenv(f"LONGSHIFT_{name.upper()}", raising=False)


def test_without_any_setting_the_defaults_describe_a_local_stack() -> None:
    settings = config.load()

    assert settings.database_url is None
    assert settings.data == Path(".longshift")
    assert settings.host == "127.0.0.1"
    assert settings.queues == ("default",)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHIFT_PORT", "9000")
    monkeypatch.setenv("LONGSHIFT_AGENTS", "one, two.three ,")
    monkeypatch.setenv("LONGSHIFT_DATA", "/var/lib/longshift")

    settings = config.load()

    assert settings.port == 9000
    assert settings.agents == ("one", "two.three")
    assert settings.data == Path("/var/lib/longshift")


def test_a_given_value_wins_over_the_environment_and_none_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHIFT_PORT", "9000")
    monkeypatch.setenv("LONGSHIFT_WORKERS", "3")

    settings = config.load(port=9001, workers=None)

    assert (settings.port, settings.workers) == (9001, 3)


@pytest.mark.parametrize(
    ("text", "duration"),
    [("2", timedelta(seconds=2)), ("0.25", timedelta(milliseconds=250)), ("PT1.5S", timedelta(seconds=1.5))],
)
def test_a_duration_is_a_number_of_seconds_or_iso_8601(
    monkeypatch: pytest.MonkeyPatch, text: str, duration: timedelta
) -> None:
    monkeypatch.setenv("LONGSHIFT_SWEEP", text)

    assert config.load().sweep == duration


@pytest.mark.parametrize("times", [{"heartbeat": "2"}, {"lock_grace": "1"}, {"lease_ttl": "3"}])
def test_times_under_which_nobody_could_be_found_dead_are_refused(times: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="LONGSHIFT_LOCK_GRACE must be at least twice LONGSHIFT_HEARTBEAT"):
        config.load(**times)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHIFT_DATABASE_URL", "")

    assert config.load().database_url is None


def test_values_that_do_not_fit_are_one_error_that_names_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHIFT_PORT", "99999")
    monkeypatch.setenv("LONGSHIFT_HEARTBEAT", "soon")

    with pytest.raises(ConfigError, match=r"LONGSHIFT_PORT: .*; LONGSHIFT_HEARTBEAT: |HEARTBEAT.*LONGSHIFT_PORT"):
        config.load()


@pytest.mark.parametrize(
    ("name", "value"), [("SESSION_TTL", "0"), ("SESSION_TTL", "-1"), ("ARCHIVE_AFTER", "-1"), ("KEEP_UPLOADS", "0")]
)
def test_times_after_which_what_is_used_would_be_gone_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LONGSHIFT_{name}", value)
    with pytest.raises(ConfigError, match=f"LONGSHIFT_{name}"):
        config.load()


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ConfigError, match="LONGSHIFT_COLOUR"):
        config.load(colour="green")


def test_a_setting_that_a_process_needs_is_named_when_it_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"LONGSHIFT_DATABASE_URL is not set: .*longshift up"):
        config.load().require("database_url")


def test_a_required_secret_is_given_in_clear_and_never_shown() -> None:
    settings = config.load(database_url="postgresql://me:secret@host/db")

    assert settings.require("database_url") == "postgresql://me:secret@host/db"
    assert "secret" not in repr(settings)


def test_settings_do_not_change() -> None:
    settings = config.load()

    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
