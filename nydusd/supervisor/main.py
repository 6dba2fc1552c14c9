"""The door of this package for the command line."""

from nydusd.supervisor.daemon import run

__all__ = ["run"]
