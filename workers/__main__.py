"""Entry of a worker process: `python -m workers --spec-fd N`, started by the supervisor."""

import sys

from workers.loop import main


def run() -> int:
    """Be what the command line says; gives the exit status."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
