"""The front-end process; see `main`."""

import sys

from nydusd.frontends.nbd.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
