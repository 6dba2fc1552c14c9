"""Entry point of a front-end process, started by the supervisor."""

import sys

from nydusd.frontends.blobfs.main import prepare
from nydusd.frontends.fuse.main import main

sys.exit(main(sys.argv[1:], prepare))
