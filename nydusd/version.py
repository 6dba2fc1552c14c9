"""Which release and which build this is: the one place that says so.

Read by the command line (`nydusd --version`) and by the supervisor and the API process (`GET /api/v1/daemon`). Clients
compare the two texts: nydus-snapshotter reads the `Git Commit:` line of the program on disk and `version.git_commit` of the
running daemon, and starts a hot upgrade when they differ. So both come from `GIT_COMMIT`, another one for each change of the
code (`nydusd.build`); it also tells a supervisor which of the processes that it took over run other code than it has.
"""

from __future__ import annotations

import sys
from typing import Final, TypedDict

from nydusd import build

VERSION: Final = "0.1.0"
GIT_COMMIT: Final = f"python-{build.loaded()}"
BUILD_TIME: Final = "2026-11-24T00:00:00Z"
PROFILE: Final = "release"


class BuildInfo(TypedDict):
    """The `version` object of the API, with the key names that clients know (`rustc` names the interpreter here)."""

    package_ver: str
    git_commit: str
    build_time: str
    profile: str
    rustc: str


def build_info() -> BuildInfo:
    """What the API reports as `version`."""
    return {
        "package_ver": VERSION,
        "git_commit": GIT_COMMIT,
        "build_time": BUILD_TIME,
        "profile": PROFILE,
        "rustc": "Python {}.{}.{}".format(*sys.version_info[:3]),
    }


def commit_on_disk() -> str:
    """The `GIT_COMMIT` that a process started now would have: an upgrade may have replaced the files since we started."""
    try:
        return f"python-{build.on_disk()}"
    except OSError:  # they are being replaced
        return GIT_COMMIT


def version_text(program: str) -> str:
    """The output of `--version`: one `Name: value` line each, after the name and a carriage return as clients know it."""
    info = build_info()
    return (
        f"{program} \r"
        f"Version: \t{info['package_ver']}\n"
        f"Git Commit: \t{info['git_commit']}\n"
        f"Build Time: \t{info['build_time']}\n"
        f"Profile: \t{info['profile']}\n"
        f"Rustc: \t\t{info['rustc']}\n"
    )
