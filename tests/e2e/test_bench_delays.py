"""The benchmark of delays measures what it says: whole files, from a registry as far away as told, drawn as they are."""

from __future__ import annotations

import http.client
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench import delays
from bench.registry import far_away
from tests.support.discipline import discipline


def test_a_registry_serves_the_blob_and_parts_of_it(tmp_path: Path) -> None:
    blob = tmp_path / "b10b"
    blob.write_bytes(bytes(range(256)) * 4096)
    with far_away(blob, "a/b", 0.001) as host:
        connection = http.client.HTTPConnection(host, timeout=10)
        for asked, first, last in (("bytes=5-9", 5, 9), ("bytes=1048570-", 1048570, 1048575)):
            connection.request("GET", "/v2/a/b/blobs/sha256:b10b", headers={"Range": asked})
            answer = connection.getresponse()
            assert answer.read() == blob.read_bytes()[first : last + 1]
            assert (answer.status, answer.getheader("Content-Range")) == (206, f"bytes {first}-{last}/1048576")
        connection.request("HEAD", "/v2/a/b/blobs/sha256:b10b")
        assert connection.getresponse().getheader("Content-Length") == "1048576"
        connection.close()


def test_a_daemon_is_measured(tmp_path: Path) -> None:
    image = delays.make_image(tmp_path, 1 << 20)
    command = [sys.executable, "-m", "nydusd", "fuse"]
    figures = delays.measure(image, 0.001, command, {"NYDUSD_RUNTIME_DIR": str(discipline.runtime)})
    assert set(figures) == {delays.START, delays.READ} and min(figures.values()) > 0


def test_table_and_plot_show_every_figure() -> None:
    rows = [{delays.START: 0.5 + far, delays.READ: 100 / (1 + far)} for far in delays.ROUND_TRIPS]
    twice = [{delays.START: row[delays.START] * 2, delays.READ: row[delays.READ] / 2} for row in rows]
    text = delays.table({"ours": rows, "reference": twice})
    assert text.splitlines()[2] == "| 0 ms | 0.50 | 1.00 | 100.0 | 50.0 | 2.00 | 2.00 |"
    assert len(text.splitlines()) == 2 + len(rows)
    drawn = ElementTree.fromstring(delays.plot({"ours": rows, "reference": twice}))
    circles = [element for element in drawn.iter() if element.tag.endswith("circle") and element.get("r") == "3"]
    assert len(circles) == 2 * 2 * len(rows)
