"""What is to be found of a daemon that does not answer: its record in the run-time folder, and what that leads to.

Runs in the `nydusctl` process. The record (`state.json`) says which socket the API is at, so it is found by that. Nothing here
waits for the daemon: files, /proc and shared memory are there whatever its processes do, and after they were killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from nydusd.cli.ctl.picture import png, states_of
from nydusd.errors import CacheError, NydusError
from nydusd.nursery.place import root

Json = dict[str, object]


def records() -> Iterator[tuple[str, Json]]:
    """What each daemon of the node has written down, by its instance. Raises NydusError for whoever may not read that."""
    # Only where it is needed: it is a part of the supervisor's.
    from nydusd.supervisor.checked import read_checked

    folder = Path(root())
    try:
        instances = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise NydusError(f"{folder}: {error.strerror}: run nydusctl as the daemon's user (root)") from error
    for instance in instances:
        try:
            yield instance, read_checked(folder / instance / "state.json")
        except CacheError:  # a lock, a log, a daemon that begins or ends just now, or one of another user
            continue


class Record:
    """What is written down of the daemon whose API is at a socket. Raises NydusError if nothing is."""

    def __init__(self, socket: str) -> None:
        for instance, record in records():
            if record.get("apisock") == os.path.abspath(socket):
                self.instance, self.content = instance, record
                return
        raise NydusError(f"no record below {root()} names the socket {socket}")

    def processes(self) -> dict[int, str]:
        """Those of them that live, with what they call themselves."""
        from nydusd.storage.state.lock import start_time

        holders = self.content.get("holders")
        known = []
        for name in ("processes", "besides"):
            rows = self.content.get(name)
            known += [tuple(row) for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
        if isinstance(holders, list):
            known += [(row.get("pid"), row.get("start")) for row in holders if isinstance(row, dict)]
        # Who has the pid now but began at another time is somebody else.
        pids = [row[0] for row in known if len(row) == 2 and isinstance(row[0], int) and start_time(row[0]) == row[1]]
        return {pid: _name(pid) for pid in dict.fromkeys(pids)}

    def log_file(self) -> str | None:
        """None: it writes to stderr."""
        file = self.content.get("log")
        return file if isinstance(file, str) else None

    def configuration(self) -> bytes:
        """That of the command line, without secrets. Raises NydusError."""
        from nydusd.config import load_config_file, redacted

        path = self.content.get("config")
        if not isinstance(path, str):
            raise NydusError("the daemon was started without a configuration")
        return json.dumps(redacted(load_config_file(path)), indent=1).encode()

    def chunk_maps(self) -> bytes:
        """A picture of all that are in shared memory. Raises OSError."""
        from nydusd.control.enrich import with_states
        from nydusd.storage.cache.manager import segments_in
        from nydusd.storage.state.names import names

        prefix = f"/nydusd.{self.instance}."
        found = segments_in(names(prefix[1:]), prefix)
        blobs = with_states({"blobs": [{"segment": name} for name in found]})["blobs"]
        return png([states_of(blob) for blob in blobs] if isinstance(blobs, list) else [])


def _name(pid: int) -> str:
    """Of a process of ours, as a part of a file's name."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return "ended"
    return name.removeprefix("nydusd: ").replace(" ", "-").replace("/", "-")[:32]
