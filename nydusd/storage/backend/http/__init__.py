"""Backends that speak HTTP: what registry, OSS, S3 and http-proxy have in common. Run by fetch workers.

`base` is the reader with its retries and the hooks of a backend; `transport` sends one request; `answer` checks what came;
`route` chooses between proxy, mirrors and origin; `store` is what the workers of a daemon know in common.
"""
