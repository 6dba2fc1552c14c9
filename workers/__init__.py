"""What a worker process runs: fetch (I/O: metadata, checkpoints) and decompress (decode, verify, store) jobs."""
