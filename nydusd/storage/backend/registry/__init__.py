"""Container registries as a backend: the OCI distribution API, its credentials and tokens. Run by fetch workers."""
