"""The API process: HTTP on a unix socket, answered by asking the supervisor."""
