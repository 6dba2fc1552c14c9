"""What was set by the API at run time, and how a successor knows it again."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nydusd.supervisor.control_ops import OPS, recall, remember


def daemon(folder: Path, *, given: bool) -> Any:
    """What is needed of one, with an image of the command line's configuration or of the API's."""
    configured: list[dict[str, str]] = []
    image = SimpleNamespace(place="/x", given=given, configure=configured.append)
    options = SimpleNamespace(config=str(folder / "config.json"))
    return SimpleNamespace(
        run_dir=str(folder), options=options, settings={}, images={"/x": image}, configured=configured, blobs=None
    )


@pytest.mark.parametrize("hours", [-1000, 0, 1000])
@pytest.mark.parametrize("given", [True, False])
def test_what_was_set_gives_way_to_a_file_that_was_written_since_by_whichever_clock(
    tmp_path: Path, hours: int, given: bool
) -> None:
    """The clock may have been put back, or forth, between the two."""
    config = tmp_path / "config.json"
    config.write_text("{}")
    told = daemon(tmp_path, given=given)
    told.settings = {"x": {"proxy_url": "http://one"}}
    remember(told)
    config.write_text('{"id": "x"}')
    when = config.stat().st_mtime_ns + hours * 3600 * 10**9
    os.utime(config, ns=(when, when))
    next_one = daemon(tmp_path, given=given)
    recall(next_one)(next_one.images["/x"])
    assert next_one.settings == told.settings
    assert next_one.configured == ([] if given else [{"proxy_url": "http://one"}])


def test_what_was_set_holds_while_the_file_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = daemon(tmp_path, given=True)
    told.settings = {"/x": {"proxy_url": "http://one"}}
    remember(told)
    next_one = daemon(tmp_path, given=True)
    recall(next_one)(next_one.images["/x"])
    assert next_one.configured == [{"proxy_url": "http://one"}]


@pytest.mark.parametrize(
    ("name", "alone", "of_singleton"),
    [
        ("/x", 1, 1),
        ("x", 1, 1),
        ("/x/", 1, 1),
        ("//x", 1, 1),
        ("/", 0, 1),
        ("", 0, 1),
        (None, 0, 1),
        ("/y", 0, 0),
        ("xx", 0, 0),
    ],
)
def test_images_are_meant_by_their_mount_point_and_all_of_a_singleton_by_the_root(
    tmp_path: Path, name: str | None, alone: int, of_singleton: int
) -> None:
    for blobs, times in ((None, alone), (object(), of_singleton)):
        told = daemon(tmp_path, given=False)
        told.blobs = blobs
        OPS["set_config"](told, {"id": name, "values": {"proxy_url": "http://one"}})
        assert told.configured == [{"proxy_url": "http://one"}] * times
