"""Errors of the builder. Each names the file or member that it is about."""

from __future__ import annotations

from nydusd.errors import NydusError


class ImageError(NydusError):
    """An image cannot be made or read as asked."""


class SourceError(ImageError):
    """A file or member of the source cannot be read, or changed while it was read, or cannot be expressed.

    `member` is its path in the image, as bytes: any name is possible.
    """

    def __init__(self, member: bytes, message: str) -> None:
        super().__init__(member, message)
        self.member = member
        self.message = message

    def __str__(self) -> str:
        return f"{show(self.member)}: {self.message}"


class CannotReferError(ImageError):
    """The data of a layer cannot stay in the layer: it is nowhere in it as a reader needs it. It can be packed into a blob."""


class InconsistentLayersError(ImageError):
    """Layers to be merged were built with different parameters. The reference's builder ends with status 2, too."""

    exit_code = 2


def show(path: bytes) -> str:
    """A path for a message: readable, on one line, no terminal controls."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]
