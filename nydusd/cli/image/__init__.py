"""The verbs of `nydus-image`, one file each."""
