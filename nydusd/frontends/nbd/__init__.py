"""An image as one block device, exported over a unix socket by the NBD protocol: layout, protocol, connections."""
