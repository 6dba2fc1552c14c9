"""What docs/faults.md says of each fault, one row each. The tests that show it are named, and cover their rows."""

from __future__ import annotations

from typing import NamedTuple

MOUNTED = "tests/backend/test_mounted_faults.py::test_a_fault_and_its_end"
_OUTAGE = "tests/backend/test_mounted_outage.py::test_"
ORIGIN = f"{_OUTAGE}registry_that_is_stopped_under_load_and_started_again_costs_its_readers_a_delay"
STORM = f"{_OUTAGE}sixty_four_readers_of_a_dead_origin_are_few_requests"
PAGE = f"{_OUTAGE}readers_of_a_blob_that_only_comes_wrong_are_few_requests"
SILENT = f"{_OUTAGE}silent_token_server_holds_no_reader_of_another_host"
PROXY = "tests/backend/test_mounted_proxy.py::test_what_a_proxy_gives_instead_of_the_blob_comes_from_the_origin"
FALLBACK = "tests/backend/test_mounted_proxy.py::test_all_bytes_come_by_the_proxy_until_it_dies"
CREDENTIALS = "tests/backend/test_mounted_credentials.py::test_expired_credentials_end_neither_the_mount_nor_the_daemon"
METADATA = "tests/backend/test_mounted_credentials.py::test_metadata_that_could_not_be_had_is_asked_for_again"
NAMES = "tests/backend/test_http_connect.py::test_a_name_that_is_not_found_any_more_is_still_reached"
CONNECT = "tests/backend/test_http_connect.py::test_a_connection_that_is_not_accepted_ends_in_time"

DATA = "the data"
LATE = "the data, a little later"
ERROR = "EIO; the data when that is over"
LATE_ERROR = "EIO after `read_deadline`; the data when that is over"


class Row(NamedTuple):
    """`log` is what follows `blob ID: HOST: ` in the log, a dash where there is no line."""

    fault: str
    reader: str
    log: str
    test: str


ROWS = [
    Row("401, the token has ended", LATE, "status 401 … asked again", MOUNTED),
    Row("403, the token has ended", LATE, "status 403 … asked again", MOUNTED),
    Row("401 for ever", ERROR, "status 401, credentials are missing, wrong or expired", MOUNTED),
    Row("403 for ever", ERROR, "status 403, credentials are missing, wrong or expired", MOUNTED),
    Row("404", ERROR, "status 404, it has no such blob", MOUNTED),
    Row("416", ERROR, "status 416, the stored blob is shorter than the image says", MOUNTED),
    Row("429 with Retry-After", "the data, after that time", "status 429", MOUNTED),
    Row("500", LATE, "status 500", MOUNTED),
    Row("503", LATE, "status 503", MOUNTED),
    Row("503 with Retry-After", "the data, after that time", "status 503", MOUNTED),
    Row("500 for ever", LATE_ERROR, "status 500", MOUNTED),
    Row("reset before the answer", LATE, "the connection broke", MOUNTED),
    Row("reset in mid-body", LATE, "the connection broke in the body", MOUNTED),
    Row("body shorter than its right Content-Length", LATE, "the body is shorter than it should be", MOUNTED),
    Row("200 with the whole blob, near its start", DATA, "—", MOUNTED),
    Row("200 with the whole blob, behind 1 MiB", ERROR, "it sends the whole blob where a part is asked for", MOUNTED),
    Row("wrong Content-Range", LATE, "wrong answer: Content-Range", MOUNTED),
    Row("206 without Content-Range", LATE, "wrong answer: Content-Range", MOUNTED),
    Row("gzip'd answer", LATE, "wrong answer: a body in encoding", MOUNTED),
    Row("page with status 200", LATE, "wrong answer: a page instead of the blob", MOUNTED),
    Row("stalled body", "the data, after `timeout`", "the body stalled", MOUNTED),
    Row("slow start, within `timeout`", LATE, "—", MOUNTED),
    Row("slow start, beyond `timeout`", "the data, after `timeout`", "no answer in time", MOUNTED),
    Row("slow body that moves", LATE, "—", MOUNTED),
    Row("expired redirect", LATE, "status 403 … a remembered redirect; another way is tried", MOUNTED),
    Row("wrong bytes", LATE, "the chunk, both digests; read once more", MOUNTED),
    Row("wrong bytes for ever", ERROR, "the chunk, both digests, twice", MOUNTED),
    Row("each connection closed", DATA, "—", MOUNTED),
    Row("origin down under load, and back", LATE, "no connection to it; counts as down; answers again", ORIGIN),
    Row(
        "origin down for longer than `read_deadline`, 64 readers at once",
        LATE_ERROR,
        "counts as down; readers have no more time",
        STORM,
    ),
    Row(
        "page with status 200 for longer than `read_deadline`, 64 readers at once",
        LATE_ERROR,
        "wrong answer: a page instead of the blob; counts as down",
        PAGE,
    ),
    Row("token server that accepts and says nothing", LATE_ERROR, "no token: no answer in time", SILENT),
    Row("proxy that answers 200 with a page", LATE, "wrong answer … by proxy … another way is tried", PROXY),
    Row("proxy that dies", LATE, "no connection by the proxy … another way is tried", FALLBACK),
    Row("expired credentials at start", ERROR, "status 401, credentials are missing, wrong or expired", CREDENTIALS),
    Row("blob metadata not to be had at start", ERROR, "status 404, it has no such blob", METADATA),
    Row("host name not found any more", DATA, "look-up failed, using the last address known", NAMES),
    Row("connection not accepted", "EIO after `connect_timeout`, 4 times", "no connection to it in time", CONNECT),
]


def rows_of(test: str) -> list[str]:
    """The faults that a test has to show."""
    return [row.fault for row in ROWS if row.test == test]


class Seen(NamedTuple):
    """What was seen of the reference (2.4.4), and the test in which ours does better."""

    reference: str
    here: str
    test: str


_FAULTS = "tests/backend/test_http_faults.py::"
_ROUTES = "tests/backend/test_http_routes.py::"
_MOUNT = "tests/backend/test_mounted_faults.py::"
_LOCAL = "tests/storage/test_backend_localfs.py::"

SEEN = [
    Seen(
        "500 and 429: four tries within 0.2 s, no back-off, Retry-After ignored",
        "back-off with jitter; Retry-After is waited for, by all workers",
        f"{_FAULTS}test_a_wait_that_the_deadline_does_not_allow_is_not_begun",
    ),
    Seen(
        "one failing image delays reads of all images: last tries queue at one a second",
        "what fails is counted for each host; other hosts do not notice",
        "tests/backend/test_registry_token_servers.py::test_a_dead_token_server_of_one_mount_is_nothing_to_another",
    ),
    Seen(
        "eight readers of one failing chunk: 32 requests, EIO after up to 15 s",
        "one read with its retries, its failure is everybody's",
        f"{_MOUNT}test_readers_of_one_failing_chunk_share_its_failure",
    ),
    Seen(
        "four readers of one slow chunk: four downloads",
        "one download, however slow",
        f"{_MOUNT}test_readers_of_one_slow_chunk_are_one_download",
    ),
    Seen(
        "cached file while six misses stall: 43 s",
        "read as always: a hit waits for nobody",
        f"{_MOUNT}test_what_is_cached_is_read_while_readers_wait_for_a_silent_registry",
    ),
    Seen(
        "stalled body: EIO after 40 s",
        "the rest is asked for after `timeout`; a reader's deadline ends everything",
        f"{_FAULTS}test_the_deadline_of_the_reader_ends_everything",
    ),
    Seen(
        "`retry_limit` is ignored",
        "it is the number of retries; 0, the default, means 3",
        f"{_FAULTS}test_the_number_of_retries_is_configured",
    ),
    Seen(
        "metadata that failed to download: every later read EINVAL until remount",
        "tried again by the next reads (1 s … 30 s)",
        METADATA,
    ),
    Seen(
        "200 with the whole blob: error each time, the blob downloaded up to the buffer's end",
        "used near the blob's start, refused without a download behind 1 MiB",
        f"{_FAULTS}test_a_server_without_ranges_is_no_good_for_the_rest",
    ),
    Seen(
        "wrong bytes, v6 image: served and cached, even with `validate: true`",
        "every chunk is checked; read once more, then EIO, never cached",
        MOUNTED,
    ),
    Seen(
        "remembered redirect that answers 404 or 5xx: its body taken for data, then EIO for ever",
        "dropped, and the registry is asked",
        f"{_ROUTES}test_a_remembered_redirect_that_fails_is_dropped_and_asked_for_anew",
    ),
    Seen(
        "relative Location: fails; second redirect: its body is read as data, 3,000 requests",
        "up to ten hops, relative ones too",
        f"{_ROUTES}test_redirects_may_be_relative_and_several",
    ),
    Seen(
        "dead proxy, `fallback` false: a last try that should pass the proxy does not",
        "`fallback` false means never past the proxy, `fallback` true at the first failure",
        f"{_ROUTES}test_a_dead_proxy_without_fallback_never_reaches_the_origin",
    ),
    Seen(
        "blob shorter than the image says: four tries, EIO",
        "no retry at this server, one past a proxy (it may have a part only); the message says so",
        f"{_ROUTES}test_what_a_proxy_does_wrong_is_asked_for_at_the_origin",
    ),
    Seen(
        "local blob truncated: four tries",
        "opened anew once, then EIO; whole again, it is read again",
        f"{_LOCAL}test_a_truncated_file_is_an_error_and_works_again_when_it_is_whole",
    ),
    Seen(
        "`alt_dirs`: the first folder is never used, only the last alternative works",
        "the folder, then its alternatives in their order",
        f"{_LOCAL}test_the_folder_comes_before_its_alternatives_unless_its_file_is_empty",
    ),
    Seen(
        "name not found: every read fails for a minute",
        "the last address is used, a look-up is repeated after 1 s",
        NAMES,
    ),
]


def tables() -> tuple[str, str]:
    """Both tables as they stand in docs/faults.md (`python -m tests.support.fault_table`)."""
    first = ["| fault | a reader gets | the log says | shown by |", "| --- | --- | --- | --- |"]
    first += [f"| {row.fault} | {row.reader} | {row.log} | {_link(row.test)} |" for row in ROWS]
    second = ["| the reference | here | shown by |", "| --- | --- | --- |"]
    second += [f"| {row.reference} | {row.here} | {_link(row.test)} |" for row in SEEN]
    return "\n".join(first), "\n".join(second)


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name}](../{file})"


if __name__ == "__main__":
    print("\n\n".join(tables()))
