"""docs/faults.md and docs/backends.md say what the tests show, in the same words; and what they show can be loaded."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from nydusd.config import load_config
from tests.support.fault_table import ROWS, SEEN, tables

TOP = Path(__file__).resolve().parents[2]
BACKENDS = (TOP / "docs" / "backends.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", BACKENDS, re.MULTILINE | re.DOTALL)


def test_the_tables_are_those_that_the_tests_go_by() -> None:
    text = (TOP / "docs" / "faults.md").read_text()
    for table in tables():
        assert table in text, "python -m tests.support.fault_table prints them"


@pytest.mark.parametrize("test", sorted({row.test for row in ROWS} | {seen.test for seen in SEEN}))
def test_what_is_named_is_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (TOP / file).read_text()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_load_as_they_are(number: int, tmp_path: Path) -> None:
    """The socket of one of them must exist; everything else need not."""
    text = EXAMPLES[number]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        config = load_config(text.replace('"/run/blobs.sock"', json.dumps(str(tmp_path / "s"))), "docs/backends.md")
    assert (config.unknown_keys, config.warnings) == ((), ())
    assert config.backend is not None and config.cache is not None and config.rafs is not None


def test_every_kind_of_backend_has_an_example() -> None:
    kinds = {re.findall(r'^type = "([a-z0-9-]+)"', text, re.MULTILINE)[0] for text in EXAMPLES}
    assert kinds == {"localfs", "localdisk", "registry", "s3", "oss", "http-proxy"}
