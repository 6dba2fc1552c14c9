"""Entry point of a front-end process, started by the supervisor."""

import sys

from nydusd.frontends.blobfs.main import open_blobs
from nydusd.frontends.fuse.main import main

sys.exit(main(sys.argv[1:], open_blobs))
