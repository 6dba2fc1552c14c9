"""The list of files to be read ahead: which files of a tree it names, and in which order they are stored. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum

from nydusd.image.errors import show
from nydusd.image.node import Node, find, folders

log = logging.getLogger(__name__)


_TAKEN = -1
_MAX_PATH = 4096


class PrefetchPolicy(Enum):
    """Who reads ahead: nobody, the daemon by the table of the bootstrap, or by the first bytes of the blob (v5)."""

    NONE = "none"
    FS = "fs"
    BLOB = "blob"


def parse_list(lines: Iterable[bytes]) -> list[bytes]:
    """The paths of a list, one a line. Relative ones, and those below an earlier one, are left out with a warning."""
    found: dict[bytes, None] = {}
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if len(text) > _MAX_PATH:
            log.warning("prefetch list: %s: a path of %d bytes: left out", show(text[:200]), len(text))
            continue
        if not text.startswith(b"/"):
            log.warning("prefetch list: %s is no absolute path: left out", show(text))
            continue
        parts = [part for part in text.split(b"/") if part not in (b"", b".")]
        above = [b"/" + b"/".join(parts[:count]) for count in range(len(parts) + 1)]
        if any(path in found for path in above):
            log.warning("prefetch list: %s is below an earlier path: left out", show(text))
            continue
        found[above[-1]] = None
    return list(found)


def matched(root: Node, paths: Iterable[bytes]) -> list[Node]:
    """The nodes that paths of the list name, in its order. A path that is not in the image is left out."""
    nodes = []
    for path in paths:
        node = find(root, path)
        # A reader would find nothing to read in an empty file, and the reference does not list it.
        if node is not None and not (node.is_file and not node.size):
            nodes.append(node)
    return nodes


def storage_order(root: Node, paths: Iterable[bytes]) -> tuple[list[Node], int]:
    """All regular files whose content is to be stored, once each, in the order of their chunks; how many come from the list.

    Those at or below the paths of the list are first, in its order; then the others. Both in the order of the tree.
    """
    order: list[Node] = []
    # What has chunks already is of the parent image. Names of one file are neighbours in no order, so it is marked while it is
    # in the list: `number` says nothing before the bootstrap is laid out.
    for node in matched(root, paths):
        _add_files(node, order)
    listed = len(order)
    _add_files(root, order)
    for node in order:
        node.number = 0
    return order, listed


def _add_files(root: Node, order: list[Node]) -> None:
    if root.is_file:
        _add_file(root, order)
    for folder in folders(root):
        for _, child in folder.entries:
            if child.is_file:
                _add_file(child, order)


def _add_file(node: Node, order: list[Node]) -> None:
    if node.size and not node.packed and not node.number:
        node.number = _TAKEN
        order.append(node)
