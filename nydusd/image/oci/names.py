"""Names of images in registries, read as docker, nerdctl and containerd read them. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from nydusd.image.errors import ImageError

_HUB = "docker.io"
_HUB_SERVER = "registry-1.docker.io"
"""Who answers for docker.io: at docker.io itself is a web site."""
_HUB_ALIASES = (_HUB, "index.docker.io")

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?|\[[0-9A-Fa-f:]+\](?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"(?P<host>{_HOST})/(?P<repo>{_PART}(?:/{_PART})*)", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ImageName(NamedTuple):
    """`server` is whom to ask at `host` (both maybe with a port), `tag` a tag or a digest, `text` the whole name."""

    host: str
    server: str
    repo: str
    tag: str
    text: str


def image_name(reference: str) -> ImageName:
    """Read `HOST/REPOSITORY:TAG` or `…@DIGEST`. Raises `ImageError`.

    What stands before the first slash is a host if it has a dot or a colon in it or is `localhost`; without a host the image
    is docker.io's, and there below `library/` if it has no folder. Without a tag it is `latest`; beside a digest a tag counts
    for nothing.
    """
    rest, at, digest = reference.partition("@")
    last = rest.rpartition("/")[2]
    tag = last.partition(":")[2] if ":" in last else "latest"
    rest = rest.removesuffix(f":{tag}") if ":" in last else rest
    host, slash, repo = rest.partition("/")
    if not slash or not (set(".:[") & set(host) or host == "localhost"):
        host, repo = _HUB, rest
    if host in _HUB_ALIASES:
        host, repo = _HUB, repo if "/" in repo else f"library/{repo}"
    match = _NAME.fullmatch(f"{host}/{repo}")
    if not match or len(repo) > 255 or not _TAG.fullmatch(tag) or (at and not _DIGEST.fullmatch(digest)):
        raise ImageError(f"{reference[:300]!r} names no image: HOST/REPOSITORY:TAG is expected (or …@sha256:DIGEST)")
    text = f"{host}/{repo}{'@' if at else ':'}{digest or tag}"
    return ImageName(host, _HUB_SERVER if host == _HUB else host, repo, digest or tag, text)
