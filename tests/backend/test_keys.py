"""Keys from a file: its forms, its changes, and what is said when it is wrong (never a key)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from nydusd.errors import CredentialsRejectedError
from nydusd.logs import clean
from nydusd.storage.backend.keys import Keys, KeySource

AWS = "[default]\naws_access_key_id = ID1\naws_secret_access_key=SECRET1/+=\n"


def source(path: Path, text: str | None = None) -> KeySource:
    if text is not None:
        path.write_text(text)
    return KeySource(Keys("not", "these"), str(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_without_a_file_the_keys_are_those_given() -> None:
    assert KeySource(Keys("id", "secret")).current() == Keys("id", "secret")
    assert not KeySource(Keys()).current()


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (AWS, Keys("ID1", "SECRET1/+=")),
        (AWS + "aws_session_token = T%oken=1\n", Keys("ID1", "SECRET1/+=", "T%oken=1")),
        ("# new\n[other]\naws_access_key_id=x\naws_secret_access_key=y\n" + AWS, Keys("ID1", "SECRET1/+=")),
        ("[only]\naccess_key_id = ID2\naccess_key_secret = S2\nsecurity_token = T2\n", Keys("ID2", "S2", "T2")),
    ],
)
def test_forms_of_the_file(path: Path, text: str, keys: Keys) -> None:
    assert source(path, text).current() == keys


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 0 sections and none is"),
        ("SECRETWORD", "is no list of"),
        ("SECRETWORD = x\n", "is no list of"),
        ("[default]\nSECRETWORD\n", "is no list of"),
        ("[default]\naws_access_key_id = SECRETWORD\n", "has no aws_access_key_id or no"),
        ("[default]\naws_secret_access_key = SECRETWORD\n", "has no aws_access_key_id or no"),
        ("[a]\nx=SECRETWORD\n[b]\n", "has 2 sections and none is"),
        ("SECRETWORD" * 10000, "is longer than 65536 bytes"),
    ],
)
def test_a_file_that_is_wrong(path: Path, text: str, says: str) -> None:
    with pytest.raises(CredentialsRejectedError, match=f"credentials_file {path}: {says}") as caught:
        source(path, text).current()
    assert "SECRETWORD" not in str(caught.value)


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(CredentialsRejectedError, match="No such file or directory"):
        source(path).current()
    with pytest.raises(CredentialsRejectedError, match="Is a directory"):
        source(path.parent).current()
    os.mkfifo(path)
    with pytest.raises(CredentialsRejectedError, match="has 0 sections"):
        source(path).current()
    path.unlink()
    path.write_bytes(b"[default]\naws_access_key_id = \xff\n")
    with pytest.raises(CredentialsRejectedError):
        source(path).current()


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(path: Path) -> None:
    keys = source(path, AWS)
    first = keys.current()
    assert keys.current() is first
    new = path.with_name("new")
    new.write_text(AWS.replace("1", "2"))
    new.rename(path)
    assert keys.current() == Keys("ID2", "SECRET2/+=")


def test_a_file_that_goes_away_or_bad_leaves_the_last_keys(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    keys = source(path, AWS)
    first = keys.current()
    path.write_text("[default]\naws_access_key_id = LEAK\n")
    assert [keys.current(), keys.current()] == [first, first]
    path.unlink()
    assert keys.current() == first
    assert [record.getMessage() for record in caplog.records] == [
        f"credentials_file {path}: has no aws_access_key_id or no aws_secret_access_key; the keys read before stay in use"
    ]
    path.write_text(AWS.replace("1", "3"))
    assert keys.current().key_id == "ID3"


def test_keys_from_a_file_are_masked_in_the_log(path: Path) -> None:
    source(
        path, "[default]\naws_access_key_id=MASKEDID\naws_secret_access_key=MASKEDSEC\naws_session_token=MASKEDTOK"
    ).current()
    assert "MASKED" not in clean("a MASKEDID b MASKEDSEC c MASKEDTOK")
