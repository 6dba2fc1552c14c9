"""OCI images: where they are kept (layout folders, registries), and how one becomes a nydus image."""
