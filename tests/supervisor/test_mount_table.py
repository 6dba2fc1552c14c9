"""The table of mounts, and what a front end makes of it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.errors import CacheError
from nydusd.frontends.fuse.pseudo import tree_of
from nydusd.ipc.shared_number import map_number
from nydusd.storage.state.names import remove
from nydusd.supervisor import mount_table
from nydusd.supervisor.mount_table import MountTable, PlaceError, parse_place

NAME = f"/nydusd.test-{uuid.uuid4().hex[:12]}.mounts"


@pytest.fixture
def table(tmp_path: Path) -> Iterator[MountTable]:
    made = MountTable(tmp_path / "mounts", NAME)
    yield made
    made.close()
    remove(NAME)


def names(place: str) -> tuple[bytes, ...]:
    return parse_place(place)[1]


def recorded(table: MountTable) -> list[tuple[int, str, object]]:
    return sorted((index, place, table.record(names(place))) for index, place in table.mounted())


def seen(table: MountTable, folder: Path) -> dict[str, int | None]:
    """Path -> index of the image there, as a front end reads the table."""
    places = tree_of(json.loads((folder / "mounts" / "table.json").read_bytes())["places"])
    paths: dict[int, str] = {1: ""}
    for place in places.values():
        if place.number != 1:
            paths[place.number] = f"{paths[place.parent]}/{place.name.decode()}"
    return {paths[number] or "/": place.index for number, place in places.items()}


def test_places_have_one_spelling() -> None:
    for given in ("/a/b", "/a/b/", "//a///b", "/./a/./b/."):
        assert parse_place(given) == ("/a/b", (b"a", b"b"))
    assert parse_place("/") == parse_place("///") == parse_place("/.") == ("/", ())
    assert parse_place("/\udcff") == ("/\udcff", (b"\xff",))


@pytest.mark.parametrize("wrong", ["", "a", "./a", "/a/../b", "/..", "/a\0b", "/" + "x" * 256, "/x" * 2049, "/\ud800"])
def test_what_is_no_place_is_refused(wrong: str) -> None:
    with pytest.raises(PlaceError, match="mount point"):
        parse_place(wrong)


def test_folders_lead_to_mounts_and_go_with_them(table: MountTable, tmp_path: Path) -> None:
    assert seen(table, tmp_path) == {"/": None}
    assert table.add(names("/a/b/c"), {"id": "/a/b/c"}) == 1
    assert table.add(names("/a/d"), {}) == 2
    assert seen(table, tmp_path) == {"/": None, "/a": None, "/a/b": None, "/a/b/c": 1, "/a/d": 2}
    assert json.loads((tmp_path / "mounts/1.0.json").read_bytes()) == {"id": "/a/b/c"}
    table.remove(names("/a/b/c"))
    assert seen(table, tmp_path) == {"/": None, "/a": None, "/a/d": 2}
    table.remove(names("/a/d"))
    assert seen(table, tmp_path) == {"/": None}
    assert sorted(os.listdir(tmp_path / "mounts")) == ["table.json"]


def test_every_change_is_announced(table: MountTable) -> None:
    number = map_number(NAME)
    before = number[0]
    table.add(names("/a"), {})
    table.replace(names("/a"), {}, same=True)
    table.remove(names("/a"))
    assert number[0] == before + 3
    number.release()


def test_no_two_who_have_published_it_have_the_same_number(table: MountTable, tmp_path: Path) -> None:
    """Whatever they have written down of it elsewhere, or could not."""
    assert (table.next_term(0), table.next_term(3)) == (1, 4)
    table.begin_term(table.next_term(0))
    for expected in (2, 3):
        taken = MountTable.take_over(tmp_path / "mounts", NAME)
        assert taken.next_term(0) == expected
        assert taken.next_term(7) == 8
        taken.begin_term(expected)
        taken.close()


def test_that_cannot_be_written_in_a_takeover_is_published_as_it_is_there(
    table: MountTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Front ends must hear of the new supervisor. What it could not leave out is left out by the next one that can write."""
    for place in ("/a", "/b"):
        table.add(names(place), {}, {})
    number = map_number(NAME)
    (tmp_path / "mounts" / "table.tmp").mkdir()
    for expected in (1, 2):
        before = number[0]
        taken = MountTable.take_over(tmp_path / "mounts", NAME)
        assert taken.next_term(0) == expected
        taken.forget(names("/b"))
        taken.begin_term(expected)
        assert (number[0], number[1]) == (before + 1, expected)
        assert seen(table, tmp_path) == {"/": None, "/a": 1, "/b": 2}
        assert "table.json: Is a directory; front ends go on" in caplog.text
        caplog.clear()
        taken.close()
    (tmp_path / "mounts" / "table.tmp").rmdir()
    taken = MountTable.take_over(tmp_path / "mounts", NAME)
    taken.forget(names("/b"))
    taken.begin_term(3)
    assert seen(table, tmp_path) == {"/": None, "/a": 1}
    taken.close()
    number.release()


def test_indexes_are_never_given_twice(table: MountTable) -> None:
    given = []
    for _ in range(600):
        given.append(table.add(names("/a"), {}))
        table.remove(names("/a"))
    assert len(set(given)) == 600


def test_the_first_image_at_the_root_is_index_0_and_no_later_one(table: MountTable) -> None:
    assert table.add((), {}) == 0
    table.remove(())
    assert table.add((), {}) == 1


def test_no_more_indexes_is_an_error(table: MountTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "INDEX_MAX", 1)
    table.add(names("/a"), {})
    with pytest.raises(PlaceError, match="start another one"):
        table.add(names("/b"), {})


def test_mounts_on_mounts(table: MountTable) -> None:
    table.add(names("/a/b"), {})
    with pytest.raises(PlaceError, match="already exists"):
        table.add(names("/a/b"), {})
    for above in ("/a", "/"):
        with pytest.raises(PlaceError, match="would hide what is mounted at /a/b"):
            table.add(names(above), {})
    assert table.under(names("/a/b")) is None
    assert table.under(names("/a/c")) is None
    assert table.under(names("/a/b/c/d")) == (1, 2)
    table.add(names("/a/b/c"), {})
    with pytest.raises(PlaceError, match="in use: /a/b/c is mounted in it"):
        table.remove(names("/a/b"))
    for nothing in ("/", "/a", "/x", "/a/b/c/d"):
        with pytest.raises(PlaceError, match="doesn't exist"):
            table.remove(names(nothing))


def test_a_deep_place_is_no_matter(table: MountTable, tmp_path: Path) -> None:
    deep = "/x" * 2048
    table.add(names(deep), {})
    assert seen(table, tmp_path)[deep] == 1
    table.remove(names(deep))
    assert seen(table, tmp_path) == {"/": None}


def test_the_same_metadata_keeps_its_index_and_other_gets_a_new_one(table: MountTable, tmp_path: Path) -> None:
    table.add(names("/a"), {})
    assert table.replace(names("/a"), {"n": 1}, same=True) == 1
    assert json.loads((tmp_path / "mounts/1.1.json").read_bytes()) == {"n": 1}
    assert table.replace(names("/a"), {"n": 2}, same=False) == 2
    assert sorted(os.listdir(tmp_path / "mounts")) == ["2.0.json", "table.json"]


def test_what_cannot_be_written_is_not_unmounted(table: MountTable, tmp_path: Path) -> None:
    for place in ("/a", "/b/c/d"):
        table.add(names(place), {}, {"mounted": place})
    before = seen(table, tmp_path), recorded(table)
    for place in ("/a", "/b/c/d"):
        (tmp_path / "mounts").rename(tmp_path / "away")
        with pytest.raises(CacheError, match="No such file"):
            table.remove(names(place))
        (tmp_path / "away").rename(tmp_path / "mounts")
        table.publish()
        assert (seen(table, tmp_path), recorded(table)) == before
    for place in ("/a", "/b/c/d"):
        table.remove(names(place))
    assert seen(table, tmp_path) == {"/": None}


def test_what_cannot_be_written_is_not_mounted(table: MountTable, tmp_path: Path) -> None:
    table.add(names("/a"), {})
    (tmp_path / "mounts").rename(tmp_path / "away")
    with pytest.raises(CacheError, match="No such file"):
        table.add(names("/b"), {})
    with pytest.raises(CacheError, match="No such file"):
        table.replace(names("/a"), {}, same=False)
    (tmp_path / "away").rename(tmp_path / "mounts")
    assert table.add(names("/c"), {}) > 1
    assert {path: index for path, index in seen(table, tmp_path).items() if path in "/a/b"} == {"/": None, "/a": 1}


@pytest.mark.parametrize("in_the_way", ["table.tmp", "1.0.json", "1.0.tmp", "2.0.json"])
def test_what_cannot_be_written_leaves_no_record_and_no_folders(
    table: MountTable, tmp_path: Path, in_the_way: str
) -> None:
    """A record has credentials. Who mounts, or remounts, tries again and again."""
    folder = tmp_path / "mounts"
    if in_the_way == "2.0.json":
        table.add(names("/a"), {}, {"secret": 0})
    before = sorted([*os.listdir(folder), in_the_way])
    (folder / in_the_way).mkdir()
    with pytest.raises(CacheError, match="Is a directory"):
        if in_the_way == "2.0.json":
            table.replace(names("/a"), {}, {"secret": 1}, same=False)
        else:
            table.add(names("/b/c"), {}, {"secret": 1})
    assert sorted(os.listdir(folder)) == before
    (folder / in_the_way).rmdir()
    table.publish()
    assert not {"/b", "/b/c"} & seen(table, tmp_path).keys()
    index = table.add(names("/b/c"), {}, {"secret": 2})
    assert (index, "/b/c", {"secret": 2}) in recorded(table)


def test_a_remount_whose_table_cannot_be_written_leaves_what_was_there(table: MountTable, tmp_path: Path) -> None:
    folder = tmp_path / "mounts"
    table.add(names("/a"), {}, {"secret": 0})
    for same in (True, False):
        (folder / "table.tmp").mkdir()
        with pytest.raises(CacheError, match="Is a directory"):
            table.replace(names("/a"), {}, {"secret": 1}, same=same)
        (folder / "table.tmp").rmdir()
        assert sorted(os.listdir(folder)) == ["1.0.json", "1.0.record", "table.json"]
        assert table.record(names("/a")) == {"secret": 0}
