"""Which of the three forms a text is, and what is said about a text that is none."""

from __future__ import annotations

import json

import pytest

from nydusd.config import load_config
from nydusd.errors import ConfigError

V1 = {"device": {"id": "one", "backend": {"type": "localfs", "config": {"dir": "/b"}}}, "mode": "direct"}


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ('{"version": 2, "id": "x"}', "x"),
        ('\n\t {"version": 2, "id": "x"}\n', "x"),
        ('version = 2\nid = "x"', "x"),
        ("# hello\r\nversion = 2\r\nid = 'x'\r\n", "x"),
        (json.dumps(V1), "one"),
        # Both keys: v2 if it has the types of v2, as existing clients decide it.
        (json.dumps({**V1, "version": 2}), ""),
        (json.dumps({**V1, "version": "2.0"}), "one"),
    ],
)
def test_form_is_recognised(text: str, id: str) -> None:
    assert load_config(text, "test").id == id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither `version` (v2) nor `device` (v1) is there, so this is not a configuration"),
        ("[]", "the configuration is neither JSON nor valid TOML: "),
        ("null", "the configuration is neither JSON nor valid TOML: "),
        ('{"version": 2', "the configuration is not valid JSON: "),
        ("version = 2\nversion = 2", "the configuration is neither JSON nor valid TOML: Cannot overwrite a value"),
        ('{"a":' * 100_000, "the configuration is not valid JSON: nested too deeply"),
        ("a = " + "[" * 100_000, "the configuration is neither JSON nor valid TOML: nested too deeply"),
        ("version = " + "9" * 10_000, "the configuration is neither JSON nor valid TOML: Exceeds the limit"),
        ('{"version":' + "9" * 5000 + "}", "the configuration is not valid JSON: Integer value out of range"),
        ("a" + ".a" * 500_000 + " = 1", "line 1 has more than 256 dots"),
        (" " * (1 << 20) + "{", "the configuration has 1048577 bytes, the limit is 1048576"),
        ('{"version": "\ud800"}', "the configuration is not valid Unicode text"),
        ("version = 2026-11-24", "version: must be a whole number from 0 to 4294967295, but is a date or time"),
        ("version = 2\ncache = 2026-11-24", "cache: must be a table, but is a date or time"),
    ],
)
def test_text_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(text, "t")
    assert str(error.value).startswith(f"t: {message}")
    assert len(str(error.value)) < 400
