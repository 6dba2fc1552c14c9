"""Small JSON files in the run-time folder that a successor must be able to believe: whole, and as they were written.

Runs in the supervisor. A file is replaced at once, so SIGKILL leaves the one before or the new one; its checksum tells of bits
that were flipped and of files that somebody has cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError
from nydusd.ipc.messages import Json


def write_checked(path: Path, content: Json) -> None:
    """Replace the file at `path`, readable for its owner only. Raises CacheError, and then it is as it was."""
    text = json.dumps(content, separators=(",", ":"))
    temporary = path.with_suffix(".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write(f'{{"check":{zlib.crc32(text.encode())}{"," if content else ""}{text[1:]}')
        points.reach("record: written")
        os.replace(temporary, path)
        points.reach("record: named")
    except OSError as e:
        with contextlib.suppress(OSError):  # what is half written takes room that is missing, and may be a secret
            os.unlink(temporary)
        raise CacheError(f"{path}: {e.strerror}", e.errno) from e


def read_checked(path: Path) -> Json:
    """What `write_checked` wrote. Raises CacheError for anything else."""
    try:
        content = json.loads(path.read_bytes())
        check = content.pop("check")
    except OSError as e:
        raise CacheError(f"{path}: {e.strerror}", e.errno) from e
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
        raise CacheError(f"{path}: not one of our files: {e}") from e
    if check != zlib.crc32(json.dumps(content, separators=(",", ":")).encode()):
        raise CacheError(f"{path}: its checksum is wrong: it was damaged")
    return dict(content)
