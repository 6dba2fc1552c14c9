"""Where the layers of an image come from, as its configuration tells (`history`), for the image that is made of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_OURS = {"created_by": "nydus-image convert"}


def new_history(old: object, kept: Sequence[bool]) -> list[object]:
    """One entry with a layer for each layer of the new image, the last one (the metadata) ours, and the old ones without.

    `kept` says of each old layer whether the new image has one for it; if not, its entry is one without a layer now. A
    history that does not fit its layers, which tools that leave it out make, tells nothing: then all entries are ours.
    """
    entries = old if isinstance(old, list) else []
    with_layer = [one for one in entries if isinstance(one, dict) and not one.get("empty_layer")]
    if len(with_layer) != len(kept) or not all(isinstance(one, dict) for one in entries):
        return [_OURS] * (sum(kept) + 1)
    made: list[object] = []
    left = iter(kept)
    for one in entries:
        made.append(one if one.get("empty_layer") or next(left) else one | {"empty_layer": True})
    return [*made, _OURS]
