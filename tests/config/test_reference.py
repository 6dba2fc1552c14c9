"""A configuration as the API shows it, key by key against what the reference (2.4.4) was seen to show of the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nydusd.config import load_config, redacted

RECORDED = json.loads((Path(__file__).resolve().parents[1] / "data/reference-configs.json").read_text())
OWN = {"nydusd", "mirrors", "failure_memory", "session_token", "credentials_file", "virtual_host"}
"""Keys that the reference does not know."""
SECRETS = {"access_key_id", "access_key_secret"}
"""Those of S3 it shows."""


def compared(value: object) -> object:
    """Without our own keys, and without the reference's secrets."""
    if not isinstance(value, dict):
        return value
    return {key: "" if key in SECRETS else compared(item) for key, item in value.items() if key not in OWN}


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_shown_as_by_the_reference(name: str) -> None:
    shown = redacted(load_config(json.dumps(RECORDED[name]["given"]), name))
    assert compared(shown) == compared(RECORDED[name]["shown"])
    assert {key for key in shown if key in OWN} == {"nydusd"}
