"""Entry of a worker process: `python -m workers --spec-fd N`, started by the supervisor."""

import sys

from workers.loop import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
