"""Where the nursery is found, and for whom it is. Used by the stub, the nursery, supervisors and API processes; imports
next to nothing.

`nursery-UID-X.sock`, `.seats`, `.log` and `.lock` in the run-time root (/run/nydusd or $NYDUSD_RUNTIME_DIR). X tells apart what
would run differently: another build, interpreter, or what an interpreter takes from its environment when it begins. The lock
is held as long as the nursery lives, from before its process begins. The log is what nursery and seats print: stacks
(SIGUSR1), and why one of them ended. After SIGKILL the files stay; who gets the lock removes them.
"""

from __future__ import annotations

import binascii
import os
import sys

from nydusd import build

DEFAULT_ROOT = "/run/nydusd"
END = b"end"
"""What a daemon that was the last one sends instead of an identity."""
IN_USE = b"in use"
LOOK = b"nydusd seats?"
"""What whoever wants to know sends: he is told in JSON how the seats of the node are taken (`nydusd.nursery.seats`)."""
READY = b"ready"
GO = b"go"
_AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "TZ", "OPENSSL_")
"""What the variables begin with that are looked at only when an interpreter or a library begins."""


def root() -> str:
    """The run-time root, absolute."""
    return os.path.abspath(os.environ.get("NYDUSD_RUNTIME_DIR") or DEFAULT_ROOT)


def is_off() -> bool:
    """Whether the operator wants no nursery."""
    return os.environ.get("NYDUSD_NURSERY", "") == "off"


def is_for_one() -> bool:
    """Whether the operator wants a nursery for a single daemon, too: whoever succeeds it then need not load anything."""
    return os.environ.get("NYDUSD_NURSERY", "") == "always"


def identity() -> bytes:
    """What a process started now would run: the build by its name, and which installation of it. Raises OSError."""
    st = os.stat(build.FILE)
    facts = [sys.version, sys.executable, build.FILE, f"{st.st_dev} {st.st_ino} {st.st_mtime_ns} {st.st_size}"]
    facts += [build.on_disk()]
    facts += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_AT_START))
    return os.fsencode("\0".join(facts))


def stem(of: bytes) -> str:
    """The path of the nursery for an identity, without its suffix."""
    return f"{root()}/{prefix()}{binascii.crc32(of):08x}"


def prefix() -> str:
    """What the names of this user's nurseries begin with."""
    return f"nursery-{os.geteuid()}-"
