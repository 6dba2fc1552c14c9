"""Marks of removed files in layers: what OCI layers and overlayfs write for "this name is gone". Pure."""

from __future__ import annotations

from enum import Enum

from nydusd.image.node import Node

OCI_PREFIX = b".wh."
OCI_OPAQUE = b".wh..wh..opq"
OVERLAY_OPAQUE = b"trusted.overlay.opaque"
_S_IFCHR = 0x2000


class Whiteouts(Enum):
    """Which marks count."""

    OCI = "oci"
    OVERLAYFS = "overlayfs"
    NONE = "none"


def removes(spec: Whiteouts, name: bytes, node: Node) -> bytes | None:
    """The name that this entry removes from the layers below; None if it is an ordinary entry or marks a folder."""
    if spec is Whiteouts.OCI and name.startswith(OCI_PREFIX) and name != OCI_OPAQUE:
        return name[len(OCI_PREFIX) :]
    if spec is Whiteouts.OVERLAYFS and node.mode & 0xF000 == _S_IFCHR and node.rdev == 0:
        return name
    return None


def opaque(spec: Whiteouts, folder: Node) -> bool:
    """Whether a folder hides all that is in the folder of its name in the layers below."""
    if spec is Whiteouts.OCI:
        return OCI_OPAQUE in folder.children
    return spec is Whiteouts.OVERLAYFS and folder.xattrs.get(OVERLAY_OPAQUE) == b"y"


def drops(spec: Whiteouts, name: bytes, node: Node) -> bool:
    """Whether an entry is nothing but a mark, which no finished image shows."""
    if spec is Whiteouts.OCI:
        return name.startswith(OCI_PREFIX)
    return removes(spec, name, node) is not None
