"""Puts one layer's tree over another's, as a union file system would show them. Pure."""

from __future__ import annotations

from nydusd.image.node import Node
from nydusd.image.whiteout import OCI_OPAQUE, OVERLAY_OPAQUE, Whiteouts, opaque, removes


def overlay(lower: Node, upper: Node, spec: Whiteouts) -> Node:
    """The tree of both; `lower` becomes it. Marks of removed files act on the lower layer and are not in the result.

    A folder over a folder keeps what is in the lower one and has the attributes of the upper one, unless that is only
    implied by what is in it; anything else replaces. What an upper layer brings itself is not touched by its own marks.
    """
    if not upper.implied:
        _adopt(lower, upper, spec)
    todo = [(lower, upper)]
    while todo:
        below, above = todo.pop()
        if opaque(spec, above):
            below.children = {}
        entries = list(above.children.items())
        for name, node in entries:
            removed = removes(spec, name, node)
            if removed is not None:
                below.children.pop(removed, None)
        for name, node in entries:
            if removes(spec, name, node) is not None or (spec is Whiteouts.OCI and name == OCI_OPAQUE):
                continue
            known = below.children.get(name)
            if not node.is_folder:
                below.children[name] = node
                continue
            if known is None or not known.is_folder:
                # A folder of its own, because the marks in it must not stay.
                known = below.children[name] = Node(name, below, node.mode)
                _adopt(known, node, spec)
            elif not node.implied:
                _adopt(known, node, spec)
            todo.append((known, node))
    return lower


def _adopt(folder: Node, source: Node, spec: Whiteouts) -> None:
    folder.mode, folder.uid, folder.gid = source.mode, source.uid, source.gid
    folder.mtime, folder.mtime_ns = source.mtime, source.mtime_ns
    folder.xattrs = source.xattrs
    if spec is Whiteouts.OVERLAYFS and OVERLAY_OPAQUE in source.xattrs:
        folder.xattrs = {key: value for key, value in source.xattrs.items() if key != OVERLAY_OPAQUE}
