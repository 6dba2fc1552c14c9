"""The grammar of the command line, with the command lines that nydus-snapshotter writes."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from nydusd.cli.arguments import NOT_YET, HelpAsked, VersionAsked, parse_arguments
from nydusd.cli.options import FuseOptions, SingletonOptions
from nydusd.errors import ConfigError, UnsupportedError

DEFAULTS = FuseOptions(
    mountpoint="/m",
    bootstrap=None,
    config=None,
    localfs_dir=None,
    apisock=None,
    id=None,
    supervisor=None,
    upgrade=False,
    fuse_threads=4,
    failover_policy="resend",
    writable=False,
    shared_dir=None,
    prefetch_files=None,
    virtual_mountpoint="/",
    dedup_db=None,
    log_level="info",
    log_file=None,
    log_rotation_size=0,
    rlimit_nofile=1_000_000,
)
IMAGE = replace(DEFAULTS, bootstrap="b", config="c")


def parse(line: str) -> FuseOptions:
    options = parse_arguments(shlex.split(line))
    assert isinstance(options, FuseOptions)
    return options


def test_options_of_singleton() -> None:
    line = "singleton -A sock -C config --fscache /f --fscache-tag t --fscache-threads 7 -l warn"
    assert parse_arguments(shlex.split(line)) == SingletonOptions(
        apisock="sock", config="config", fscache="/f", fscache_tag="t", fscache_threads=7, log_level="warn"
    )
    for wrong in ("singleton --fscache-tag t", "singleton --fscache-threads 0", "singleton --id x", "singleton -M /m"):
        with pytest.raises(ConfigError):
            parse_arguments(shlex.split(wrong))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fuse --mountpoint /m", DEFAULTS),
        ("--mountpoint /m", DEFAULTS),
        ("-M /m", DEFAULTS),
        ("-M/m", DEFAULTS),
        ("--mountpoint=/m", DEFAULTS),
        ("fuse -M /m -B b -C c", IMAGE),
        ("-M /m -B b -C c", IMAGE),
        ("-C c fuse -M /m -B b", IMAGE),
        ("-Cc fuse -M/m -Bb", IMAGE),
        ("-Cx fuse -M/m -Bb -Cc", IMAGE),
        ("fuse -M /m -B b -D d", replace(DEFAULTS, bootstrap="b", localfs_dir="d")),
        ("fuse -M /m --thread-num 7", replace(DEFAULTS, fuse_threads=7)),
        ("fuse -M /m --fuse-threads=1024", replace(DEFAULTS, fuse_threads=1024)),
        ("--thread-num 1 -M /m", replace(DEFAULTS, fuse_threads=1)),
        (
            "-l debug -L f.log -A a.sock fuse -M /m",
            replace(DEFAULTS, log_level="debug", log_file="f.log", apisock="a.sock"),
        ),
        (
            "fuse -M /m -l debug -L f.log -A a.sock",
            replace(DEFAULTS, log_level="debug", log_file="f.log", apisock="a.sock"),
        ),
        ("--upgrade fuse -M /m", replace(DEFAULTS, upgrade=True)),
        ("fuse -M /m --upgrade", replace(DEFAULTS, upgrade=True)),
        ("--id i fuse --supervisor s -M /m", replace(DEFAULTS, id="i", supervisor="s")),
        ("--rlimit-nofile 0 -M /m --log-rotation-size 100", replace(DEFAULTS, rlimit_nofile=0, log_rotation_size=100)),
        ("fuse -M /m -s d", replace(DEFAULTS, shared_dir="d")),
        ("fuse -M /m --writable --dedup-db x", replace(DEFAULTS, writable=True, dedup_db="x")),
        (
            "fuse -M /m -m /v --failover-policy flush",
            replace(DEFAULTS, virtual_mountpoint="/v", failover_policy="flush"),
        ),
        ("fuse -M /m -B b -C c --prefetch-files p", replace(IMAGE, prefetch_files="p")),
        ("fuse -M fuse", replace(DEFAULTS, mountpoint="fuse")),
    ],
)
def test_accepted(line: str, expected: FuseOptions) -> None:
    assert parse(line) == expected


def test_the_line_of_the_snapshotter() -> None:
    line = (
        "fuse --thread-num 4 --id x1 --config R/config/x1/config.json --bootstrap R/snapshots/2/fs/image/image.boot "
        "--mountpoint R/snapshots/2/mnt --apisock R/socket/x1/api.sock --log-level debug --log-rotation-size 100 "
        "--supervisor R/supervisor/x1.sock --log-file R/logs/x1/nydusd.log --failover-policy resend"
    )
    assert parse(line) == replace(
        DEFAULTS,
        mountpoint="R/snapshots/2/mnt",
        id="x1",
        config="R/config/x1/config.json",
        bootstrap="R/snapshots/2/fs/image/image.boot",
        apisock="R/socket/x1/api.sock",
        log_level="debug",
        log_rotation_size=100,
        supervisor="R/supervisor/x1.sock",
        log_file="R/logs/x1/nydusd.log",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--mountpoint is missing: nydusd fuse --bootstrap FILE --config FILE --mountpoint DIR"),
        ("erofs", "--mountpoint is missing: nydusd erofs --bootstrap FILE --config FILE --mountpoint DIR"),
        ("nbd -B b -D d /dev/nbd0", "unexpected argument '/dev/nbd0': `nydusd nbd` serves a socket (--socket PATH); "),
        ("nbd -B b -D d -S s extra", "unexpected argument 'extra' (try `nydusd --help`)"),
        ("nbd", "--socket is missing: nydusd nbd --bootstrap FILE --config FILE --socket PATH"),
        ("fuse -M", "argument -M/--mountpoint: expected one argument (try `nydusd fuse --help`)"),
        ("fuse -M /m --backend-source x", "unexpected argument '--backend-source' (try `nydusd --help`)"),
        ("fuse -M /m extra", "unexpected argument 'extra' (try `nydusd --help`)"),
        ("fuse -M /m --mount /n", "unexpected argument '--mount' (try `nydusd --help`)"),
        ("-M /m fuse", "--mountpoint must stand after the subcommand 'fuse'"),
        ("--thread-num 2 fuse -M /m", "--fuse-threads must stand after the subcommand 'fuse'"),
        ("fuse -M /m --id i", "--id and --supervisor must be given together"),
        ("fuse -M /m --supervisor s", "--id and --supervisor must be given together"),
        ("fuse -M /m -B b -s d", "--bootstrap cannot be used with --shared-dir"),
        ("fuse -M /m -D d -C c", "--localfs-dir cannot be used with --config"),
        ("fuse -M /m --prefetch-files p", "--prefetch-files needs --bootstrap"),
        ("fuse -M /m -B b", "--bootstrap needs --config or --localfs-dir"),
        ("fuse -M /m -m v", "--virtual-mountpoint: must be an absolute path, but is 'v'"),
        ("fuse -M /m -l off", "argument -l/--log-level: invalid choice: 'off'"),
        ("fuse -M /m --failover-policy x", "argument --failover-policy: invalid choice: 'x'"),
        (
            "fuse -M /m --thread-num 0",
            "argument --fuse-threads/--thread-num: must be a whole number from 1 to 1024, but is '0'",
        ),
        ("fuse -M /m --thread-num 1025", "argument --fuse-threads/--thread-num: must be a whole number from 1 to 1024"),
        ("fuse -M /m --thread-num -5", "argument --fuse-threads/--thread-num: must be a whole number"),
        ("fuse -M /m --thread-num ²", "argument --fuse-threads/--thread-num: must be a whole number"),
        ("fuse -M /m --rlimit-nofile 1e6", "argument --rlimit-nofile: must be a whole number"),
        ("mount -M /m", "argument COMMAND: invalid choice: 'mount'"),
    ],
)
def test_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(line)
    assert str(error.value).startswith(message)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", NOT_YET)
def test_front_ends_that_are_not_there_name_those_that_are(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"`nydusd {name}` is not supported: on the host use `nydusd fuse`, for"):
        parse(f"--apisock a {name} --fscache /d --sock s -l info")


@pytest.mark.parametrize("line", ["-V", "--version", "fuse -V", "fuse -M /m --version", "-A x -V"])
def test_version(line: str) -> None:
    with pytest.raises(VersionAsked):
        parse(line)


@pytest.mark.parametrize("line", ["-h", "--help", "fuse -h", "help", "help fuse", "singleton --help"])
def test_help(line: str) -> None:
    with pytest.raises(HelpAsked) as asked:
        parse(line)
    assert "--apisock" in str(asked.value)
