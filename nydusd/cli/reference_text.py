"""What the man pages say beside the options and commands. Text only; `reference.py` puts it into pages."""

from __future__ import annotations

from typing import Final

SUMMARY: Final = {
    "nydusd": "mount container images before their data has arrived",
    "nydusctl": "ask and steer a running nydusd",
    "nydus-image": "make and look into container images for nydusd",
}

ABOUT: Final[dict[str, str]] = {
    "nydusd": """
`nydusd` mounts a RAFS v5 or v6 image at once and fetches its data when somebody reads it. The process that is started
supervises the others: front ends that answer the kernel, workers that fetch and decompress, and the one that serves the REST
API. None of them takes the mount down when it dies.

Without a command, `fuse` is meant. Options of `fuse` stand after it, or anywhere without it; the global ones may stand before
or after the command.
""",
    "nydus-image": """
`nydus-image` makes RAFS images of folders and tar files: a bootstrap, which holds the metadata, and blobs, which hold the data.
`nydusd` mounts them.
""",
    "nydusctl": """
`nydusctl` talks to the REST API of a daemon on its unix socket, which only the daemon's user may open. It never looks at a
mount point, so it does not hang when a mount does. With `--raw` a command prints the daemon's answer as JSON on one line.
""",
}

_SEE_ALSO: Final = "`{}`(8), `mount`(8), `systemd.service`(5)"

SECTIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "nydusd": (
        (
            "SIGNALS",
            """
`SIGTERM` and `SIGINT`: unmount, store the chunk maps, end all processes, leave nothing behind. While it waits to take over
what another daemon has mounted: end, and leave that mounted for the next one. `SIGUSR1`, to any process of the daemon: write
the stacks of that process to the log. Nursery and seats, which serve all daemons of a node, write theirs to
`/run/nydusd/nursery-*.log`.
""",
        ),
        (
            "EXIT STATUS",
            "0 after a normal end, 1 when the daemon could not start or failed, 2 for a wrong option or configuration key.",
        ),
        (
            "ENVIRONMENT",
            """
`IMAGE_PULL_AUTH`: base64 of user:password for the registry; goes before the key in the configuration.

`NYDUSD_RUNTIME_DIR`: where sockets and state of running daemons are (/run/nydusd).

`NYDUSD_DEFAULTS`: another file in place of /etc/nydusd.toml.

`NYDUS_HEADER_NAME=VALUE`: a header of this name in each request to a registry, bucket or proxy.

`DOCKER_CONFIG`: folder of docker's config.json, for credentials of registries (~/.docker).

`NYDUSD_UNIT`: the systemd unit, set by nydusd@.service, so that `systemctl restart` keeps the mount.

`NYDUSD_NURSERY`: `off` to start without the node's nursery, and to start none; `always` to start one for a single daemon.
""",
        ),
        (
            "FILES",
            """
/run/nydusd/: the run-time folder. /dev/shm/nydusd.*: the state of each blob's chunks. Both are removed by a clean stop.

/etc/nydusd.toml: the table [nydusd] for all daemons of the node.
""",
        ),
        ("SEE ALSO", _SEE_ALSO.format("nydusctl")),
    ),
    "nydusctl": (
        (
            "EXIT STATUS",
            "0, or 1 with one line on standard error when the daemon cannot be asked, 2 for wrong arguments.",
        ),
        (
            "ENVIRONMENT",
            "`NO_COLOR`: no colours, also on a terminal. Without a terminal there are none in any case.",
        ),
        ("SEE ALSO", _SEE_ALSO.format("nydusd")),
    ),
    "nydus-image": (
        ("EXIT STATUS", "0, or 1 with one line on standard error when an image cannot be made, 2 for wrong arguments."),
        ("SEE ALSO", "`nydusd`(8)"),
    ),
}

METRICS: Final = """
# Metrics

`GET /metrics/prometheus` on the API socket gives what follows in the text format of Prometheus; `GET /metrics` is the same.
With

```toml
[nydusd]
metrics_listen = "127.0.0.1:9300"
```

it is served over TCP, too, where nothing else of the API is to be had. There is no TLS and no password: bind it to an address
that only your Prometheus reaches. A port that is taken is a WARN in the log, and the mount goes on. `conf/grafana.json` is a
dashboard for Grafana (import it, choose the Prometheus data source).

Counters begin at 0 with each start of the daemon, but for the reads of a blob (`nydusd_chunk_reads_total` and its like), which
live with the blob's shared memory and so survive a supervisor that was killed. `image_ref` is the place of an image in the
daemon's file system (`/` if there is one image only): the daemon does not know under which name it was pulled. `blob` is
the blob's id. Names with † are those of nydus-snapshotter's exporter, kept where they mean the same; they are gauges
there, so they are here, though they only grow.

Reads that wait (`nydusd_waiting_reads`, `nydusd_longest_wait_seconds`, `nydusd_hung_io_counts`) are those of all front ends:
FUSE, EROFS with fanotify, fscache, block devices. A read is one from the moment its front end has seen that something is
missing; 128 are shown of each front end at most. What follows only front ends over FUSE count: operations, reads by size,
latency (`image_ref`), and the trace. Where the kernel's EROFS reads an image (fanotify, tarfs, fscache), or a client a block
device, nobody tells us which file is read, and hits of the kernel's not at all: these stay 0 and empty; with blobfs they count
reads of blobs, and there is no trace.

Questions and where to look:

| question | answer |
| --- | --- |
| How much is served without waiting? | `rate(nydusd_chunk_reads_total[5m])` by `result` |
| Does prefetch take the network from readers? | `rate(nydusd_fetched_bytes_total[5m])` by `cause` |
| Does the quota do its work? | `nydusd_cache_used_bytes / nydusd_cache_quota_bytes`, `rate(nydusd_evicted_bytes_total[5m])` |
| Is the proxy used? | `rate(nydusd_route_bytes_total[5m])` by `route` |
| Does somebody hang? | `nydusd_hung_io_counts > 0`, `nydusd_longest_wait_seconds` |
| Do reads fail? | `rate(nydusd_chunk_read_failures_total[5m]) > 0`, `rate(nydusd_backend_failures_total[5m]) > 0` |
| Do processes die? | `increase(nydusd_process_restarts_total[1h]) > 0` |
| What does it cost? | `sum(nydusd_process_proportional_memory_bytes)`, `sum(nydusd_cache_allocated_bytes)` |
"""
