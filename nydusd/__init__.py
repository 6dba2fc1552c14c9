"""nydusd: an image service daemon that mounts container images before their data has arrived."""
