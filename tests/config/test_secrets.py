"""No secret of a configuration is in its repr, in what the API shows, or in an error."""

from __future__ import annotations

import base64
import json
import logging

import pytest

from nydusd import logs
from nydusd.config import Config, load_config, redacted, secret_values, settings_secrets
from nydusd.errors import ConfigError
from nydusd.redact import redact_text, redact_url

WORD = "hunter2secret"
AUTH = base64.b64encode(f"joe:{WORD}".encode()).decode()
SIGNED = f"https://joe:{WORD}@h:1/p?X-Amz-Signature={WORD}"
REMOTE = {
    "proxy": {"url": SIGNED, "ping_url": SIGNED, "dragonfly_scheduler_endpoint": f"joe:{WORD}@h:80"},
    "mirrors": [{"host": SIGNED, "ping_url": SIGNED, "headers": {"Authorization": f"Basic {AUTH}", "X": SIGNED}}],
}
KEYS = {"access_key_id": f"id-{WORD}", "access_key_secret": WORD}
EVERYTHING = {
    "version": 2,
    "backend": {
        "type": "registry",
        "oss": {"endpoint": f"joe:{WORD}@e", "bucket_name": "b", **KEYS, **REMOTE},
        "s3": {"endpoint": "e", "region": "r", "bucket_name": "b", **KEYS, **REMOTE},
        "registry": {
            "host": f"joe:{WORD}@h",
            "repo": "r",
            "auth": AUTH,
            "registry_token": WORD,
            "blob_redirected_host": SIGNED,
            **REMOTE,
        },
        "http-proxy": {"addr": SIGNED, **REMOTE},
    },
    "external_backends": [{"type": "t", "patch": {"token": WORD}, "config": {"my_secret_key": WORD, "u": SIGNED}}],
    "cache": {"type": "filecache", "filecache": {"encryption_key": "ab" * 32}},
}


@pytest.fixture
def config() -> Config:
    return load_config(json.dumps(EVERYTHING), "test")


def test_repr_and_what_the_api_shows_hold_no_secret(config: Config) -> None:
    for text in (repr(config), str(config), f"{config.backend!r}", json.dumps(redacted(config))):
        assert WORD not in text
        assert AUTH not in text
        assert "ab" * 32 not in text


def test_what_the_api_shows_is_the_whole_v2_form(config: Config) -> None:
    shown = redacted(config)
    assert set(shown) == {"version", "id", "backend", "external_backends", "cache", "rafs", "overlay", "nydusd"}
    assert shown["rafs"] is None
    again = load_config(json.dumps({**shown, "external_backends": []}), "test")
    assert again.backend is not None
    assert again.backend.registry is not None
    assert again.backend.registry.host == "h"
    assert again.backend.registry.auth is None
    assert again.backend.registry.proxy.url == "https://h:1/p"
    assert again.backend.localfs is None
    assert again.backend.oss is not None
    assert again.backend.oss.access_key_id == ""


def test_paths_are_shown_as_they_are() -> None:
    config = load_config('{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/a@b/c?d"}}}', "test")
    assert "/a@b/c?d" in repr(config)


def test_every_secret_value_is_known_for_the_log(config: Config) -> None:
    values = secret_values(config)
    assert {WORD, f"id-{WORD}", AUTH, f"joe:{WORD}", f"Basic {AUTH}", "ab" * 32} <= set(values)
    assert "" not in values


def test_registered_values_are_masked_in_the_log(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_secrets", [])
    for value in secret_values(config):
        logs.register_secret(value)
    logs.register_secret("abc")
    record = logging.LogRecord("n", logging.INFO, "f", 1, f"%s, abc, {AUTH} and joe:{WORD}", (WORD,), None)
    assert logs.clean(record.getMessage()) == "***, abc, *** and ***"


@pytest.mark.parametrize(
    "table",
    [
        {"registry": {"host": "h", "repo": "r", "auth": WORD}},
        {"registry": {"host": "h", "repo": "r", "registry_token": [WORD]}},
        {"registry": {"host": "h", "repo": "r", "proxy": {"url": f"socks://joe:{WORD}@h"}}},
    ],
)
def test_errors_hold_no_secret(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(json.dumps({"version": 2, "backend": {"type": "registry", **table}}), "test")
    assert WORD not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://u:p@h/x failed", "GET https://***@h/x failed"),
        ("http://a@b@h/", "http://***@h/"),
        ("http://h/a@b", "http://h/a@b"),
        ("http://h/x?Expires=5&Signature=abc%2Fd&z=1", "http://h/x?Expires=5&Signature=***&z=1"),
        ("?X-Amz-Credential=AK%2F1&X-Amz-Signature=ff&token=t", "?X-Amz-Credential=***&X-Amz-Signature=***&token=***"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
        ("{'Authorization': 'Basic YTpi', 'Range': 'bytes=0-1'}", "{'Authorization': '***', 'Range': 'bytes=0-1'}"),
        ("token is Bearer abcdef123", "token is Bearer ***"),
        ("a basic fact", "a basic fact"),
        ("mounted /a at /b", "mounted /a at /b"),
    ],
)
def test_credentials_are_known_by_their_shape(text: str, expected: str) -> None:
    assert redact_text(text) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://u:p@h:80/x?y=1", "https://h:80/x"),
        ("u:p@h:80", "h:80"),
        ("h/x", "h/x"),
        ("/run/a.sock", "/run/a.sock"),
        ("", ""),
        ("http://u:p/q@h/x", "http://h/x"),
        ("http://h/?token=t&next=http://n", "http://h/"),
        ("u:p@http://h", "http://h"),
        ("http://u:p?q@h", "http://h"),
    ],
)
def test_url_is_cut_to_what_is_harmless(url: str, expected: str) -> None:
    assert redact_url(url) == expected


def test_secrets_that_are_set_at_run_time_are_known_in_each_form() -> None:
    values = {"registry_auth": "dXNlcjpodW50ZXIy", "proxy_url": "http://me:hunter3@proxy/", "other": "proxy:80"}
    found = ["dXNlcjpodW50ZXIy", "user:hunter2", "hunter2", "me:hunter3", "hunter3"]
    assert settings_secrets(values) == found
