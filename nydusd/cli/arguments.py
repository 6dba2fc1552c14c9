"""The grammar of the `nydusd` command line. Pure: it looks at nothing but the arguments.

Clients written for the reference daemon rely on it: a subcommand or none (then the options of `fuse` hold), global options
before or after the subcommand, `--opt value`, `--opt=value`, `-Xvalue`, and `--thread-num` as another name of
`--fuse-threads`. Other options may not stand before a subcommand.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Final, NoReturn

from nydusd.cli.options import BlobfsOptions, ErofsOptions, FuseOptions, NbdOptions, Options, SingletonOptions
from nydusd.errors import ConfigError, UnsupportedError

LOG_LEVELS: Final = ("trace", "debug", "info", "warn", "error")
FAILOVER_POLICIES: Final = ("none", "resend", "flush")
DRIVERS: Final = ("auto", "tarfs", "fanotify", "blobfs", "fuse")
NOT_YET: Final = ("virtiofs", "uffd")
"""Subcommands of the reference daemon that are known by name only."""
_EARLY: Final = "early_"
"""Prefix of the destinations of fuse options given without a subcommand, to tell where they stood."""


class VersionAsked(Exception):
    """`--version` was given."""


class HelpAsked(Exception):
    """`--help` was given; the text is the argument."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (try `{self.prog} --help`)")


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        raise VersionAsked


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise HelpAsked(parser.format_help())


def parse_arguments(argv: Sequence[str]) -> FuseOptions | SingletonOptions:
    """The options of a command line, the mount point still as given.

    Raises `ConfigError` (wrong flags), `UnsupportedError` (a front end of a later version), `VersionAsked`, `HelpAsked`.
    """
    parser, topics = _parsers()
    found, extra = parser.parse_known_args(argv)
    given = dict(vars(found))
    command = given.pop("command", None)
    if command in NOT_YET:
        raise UnsupportedError(
            f"`nydusd {command}` is not supported: on the host use `nydusd fuse`, for a virtual machine `nydusd nbd` "
            "(docs/nbd.md)"
        )
    if extra and command == "nbd" and extra[0].startswith("/dev/"):
        raise ConfigError(
            f"unexpected argument {extra[0]!r}: `nydusd nbd` serves a socket (--socket PATH); attach it with "
            f"nbd-client -unix PATH {extra[0]}"
        )
    if extra:
        parser.error(f"unexpected argument {extra[0]!r}")
    if command == "help":
        raise HelpAsked(topics.get(str(given.get("topic")), parser).format_help())
    early = {name: given.pop(name) for name in list(given) if name.startswith(_EARLY)}
    if command is not None and early:
        flag = next(iter(early)).removeprefix(_EARLY).replace("_", "-")
        raise ConfigError(f"--{flag} must stand after the subcommand {command!r}")
    if command == "singleton":
        singleton = SingletonOptions(**given)
        _check_instance(singleton)
        if singleton.fscache_tag is not None and singleton.fscache is None:
            raise ConfigError("--fscache-tag needs --fscache")
        return singleton
    given.update((name.removeprefix(_EARLY), value) for name, value in early.items())
    if command == "nbd":
        if "socket" not in given:
            raise ConfigError("--socket is missing: nydusd nbd --bootstrap FILE --config FILE --socket PATH")
        nbd = NbdOptions(**given)
        _check(nbd)
        return nbd
    if "mountpoint" not in given:
        raise ConfigError(
            f"--mountpoint is missing: nydusd {command or 'fuse'} --bootstrap FILE --config FILE --mountpoint DIR"
        )
    kinds: dict[str | None, type[FuseOptions]] = {"erofs": ErofsOptions, "blobfs": BlobfsOptions}
    options = kinds.get(command, FuseOptions)(**given)
    _check(options)
    return options


def parser() -> argparse.ArgumentParser:
    """The grammar as a whole, for whoever describes it."""
    return _parsers()[0]


def _check_instance(options: Options) -> None:
    if (options.id is None) != (options.supervisor is None):
        raise ConfigError("--id and --supervisor must be given together")


def _check(options: FuseOptions) -> None:
    _check_instance(options)
    if isinstance(options, BlobfsOptions | NbdOptions) and options.bootstrap is None:
        raise ConfigError("--bootstrap is missing")
    if options.bootstrap is not None and options.shared_dir is not None:
        raise ConfigError("--bootstrap cannot be used with --shared-dir")
    if options.localfs_dir is not None and options.config is not None:
        raise ConfigError("--localfs-dir cannot be used with --config")
    if options.prefetch_files is not None and options.bootstrap is None:
        raise ConfigError("--prefetch-files needs --bootstrap")
    if options.bootstrap is not None and options.config is None and options.localfs_dir is None:
        raise ConfigError("--bootstrap needs --config or --localfs-dir")
    if not options.virtual_mountpoint.startswith("/"):
        raise ConfigError(f"--virtual-mountpoint: must be an absolute path, but is {options.virtual_mountpoint!r}")


@functools.cache
def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of the subcommands that `help` knows."""
    about = "Image service daemon: mounts container images before their data has arrived."
    parser = _Parser(
        "nydusd", description=about, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    _add_globals(parser)
    _add_fuse_options(parser, _EARLY)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str) -> _Parser:
        return commands.add_parser(
            name, help=text, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )

    fuse = add("fuse", "serve images over FUSE (also without a subcommand)")
    _add_globals(fuse)
    _add_fuse_options(fuse, "")
    erofs = add("erofs", "mount one image with the kernel's own EROFS, where that can be")
    _add_globals(erofs)
    _add_erofs_options(erofs)
    blobfs = add("blobfs", "serve the blobs of an image over FUSE, uncompressed, one file a blob")
    _add_globals(blobfs)
    _add_image_options(blobfs.add_argument_group("options of blobfs"))
    nbd = add("nbd", "export one image as a block device on a unix socket, by the NBD protocol")
    _add_globals(nbd)
    _add_nbd_options(nbd)
    singleton = add("singleton", "serve many images without a mount of its own")
    _add_globals(singleton)
    _add_singleton_options(singleton)
    for name in NOT_YET:
        _add_globals(add(name, "not supported"))
    add("help", "print this").add_argument("topic", nargs="?", help="the command to describe")
    return parser, {"fuse": fuse, "erofs": erofs, "blobfs": blobfs, "nbd": nbd, "singleton": singleton}


def _add_globals(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("global options").add_argument
    add("-A", "--apisock", metavar="PATH", help="unix socket of the REST API")
    add("-C", "--config", metavar="PATH", help="configuration of the image (JSON or TOML)")
    add("--id", metavar="TEXT", help="instance id, needs --supervisor")
    add("--supervisor", metavar="PATH", help="socket that keeps the state for failover and upgrade, needs --id")
    add("-l", "--log-level", choices=LOG_LEVELS, metavar="LEVEL", help="trace, debug, info, warn or error (info)")
    add("-L", "--log-file", metavar="PATH", help="log to this file (stderr)")
    add(
        "--log-rotation-size",
        type=_Number(0, 1 << 20),
        metavar="MIB",
        help="begin a new log file at this size (0: never)",
    )
    add("--rlimit-nofile", type=_Number(0, 1 << 31), metavar="N", help="limit of open files (1000000), 0: as it is")
    add("--upgrade", action="store_true", help="start in INIT and wait for a takeover")
    add("-h", "--help", action=_Help, nargs=0, help="print this")
    add("-V", "--version", action=_Version, nargs=0, help="print which build this is")


def _add_fuse_options(parser: argparse.ArgumentParser, prefix: str) -> None:
    add = parser.add_argument_group("options of fuse").add_argument
    add("-M", "--mountpoint", dest=f"{prefix}mountpoint", metavar="DIR", help="existing folder to mount on")
    policies = ", ".join(FAILOVER_POLICIES)
    add(
        "--failover-policy",
        dest=f"{prefix}failover_policy",
        choices=FAILOVER_POLICIES,
        metavar="POLICY",
        help=f"one of {policies} (resend)",
    )
    add(
        "--fuse-threads",
        "--thread-num",
        dest=f"{prefix}fuse_threads",
        type=_Number(1, 1024),
        metavar="N",
        help="front-end processes at most (4); one for each two cores",
    )
    add("--writable", dest=f"{prefix}writable", action="store_true", help="mount without `ro` (not supported yet)")
    add("-B", "--bootstrap", dest=f"{prefix}bootstrap", metavar="PATH", help="metadata of the image to mount")
    add(
        "-D",
        "--localfs-dir",
        dest=f"{prefix}localfs_dir",
        metavar="DIR",
        help="folder of blobs and cache, instead of -C",
    )
    add(
        "-s",
        "--shared-dir",
        dest=f"{prefix}shared_dir",
        metavar="DIR",
        help="serve this folder instead of an image (not supported yet)",
    )
    add(
        "--prefetch-files",
        dest=f"{prefix}prefetch_files",
        metavar="PATH",
        help="list of files to read ahead, one a line",
    )
    add("-m", "--virtual-mountpoint", dest=f"{prefix}virtual_mountpoint", metavar="PATH", help="place in the mount (/)")
    add("--dedup-db", dest=f"{prefix}dedup_db", metavar="PATH", help="chunk deduplication database (not supported yet)")


def _add_erofs_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of erofs")
    _add_image_options(group)
    group.add_argument("--driver", choices=DRIVERS, metavar="WAY", help=f"one of {', '.join(DRIVERS)} (auto)")


def _add_image_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-M", "--mountpoint", metavar="DIR", help="existing folder to mount on")
    _add_source_options(group)
    add(
        "--fuse-threads",
        "--thread-num",
        type=_Number(1, 1024),
        metavar="N",
        help="front-end processes over FUSE at most (4)",
    )


def _add_nbd_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of nbd")
    group.add_argument("-S", "--socket", metavar="PATH", help="unix socket to export the image at")
    _add_source_options(group)


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-B", "--bootstrap", metavar="PATH", help="metadata of the image to mount")
    add("-D", "--localfs-dir", metavar="DIR", help="folder of blobs and cache, instead of -C")
    add("--prefetch-files", metavar="PATH", help="list of files to read ahead, one a line")


def _add_singleton_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("options of singleton").add_argument
    add("-F", "--fscache", metavar="DIR", help="existing folder for the cache of the kernel's fscache")
    add("--fscache-tag", metavar="TEXT", help="tag of that cache, needs --fscache")
    add("--fscache-threads", type=_Number(1, 1024), metavar="N", help="processes that serve fscache (4)")


class _Number:
    """An argparse type: a whole number within bounds."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def __call__(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and self.low <= int(text) <= self.high):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {self.low} to {self.high}, but is {text[:32]!r}"
            )
        return int(text)
