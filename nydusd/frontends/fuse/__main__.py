"""Entry point of a front-end process, started by the supervisor."""

import sys

from nydusd.frontends.fuse.main import main


def run() -> int:
    """Be what the command line says; gives the exit status."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
