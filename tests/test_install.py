"""What is installed works from where it is: commands, pages, units, and the examples as they are."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nydusd.cli.arguments import parse_arguments
from nydusd.version import VERSION
from tests.support.daemon import Daemon
from tests.support.oracle import image, truth

ROOT = Path(__file__).resolve().parents[1]
IMAGE = image("v6-zstd-blake3")
UNIT = ROOT / "systemd" / "nydusd@.service"
DROP_IN = ROOT / "systemd" / "nydusd-erofs.conf"

EXAMPLE = """
set -e
mount -t tmpfs none /var/lib
mkdir -p /var/lib/nydus /tmp/{name}/mnt
cp -r {blobs} /var/lib/nydus/blobs
{python} -m nydusd fuse --config conf/{example} --bootstrap {bootstrap} --mountpoint /tmp/{name}/mnt &
until grep -q '/tmp/{name}/mnt fuse' /proc/self/mounts; do kill -0 $!; sleep 0.05; done
cat /tmp/{name}/mnt/dup/a
kill $!
wait $!
ls /var/lib/nydus/cache >&2
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    # Its units go to /etc unless it is put below a folder; so below one, with a prefix that is then the true path.
    environment = {**os.environ, "PREFIX": str(prefix), "DESTDIR": "/", "PYTHON": "/usr/bin/python3"}
    script = (ROOT / "scripts" / "install").read_text()
    copy = prefix.parent / "scripts" / "install"
    copy.parent.mkdir()
    copy.write_text(script.replace("/etc/", f"{prefix}/etc/").replace('cd "$(dirname "$0")/.."', f"cd {ROOT}"))
    subprocess.run(["bash", copy], env=environment, check=True, timeout=280)
    return prefix


@pytest.mark.timeout(300)
def test_commands_run_with_pinned_libraries_and_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    for command in ("nydusd", "nydusctl", "nydus-image"):
        done = subprocess.run(
            [installed / "bin" / command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(("usage: nydus", "usage: " + command))
    version = subprocess.run([installed / "bin/nydusd", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Git Commit: \tpython-([0-9a-f]{12})\n", version)
    assert VERSION in version and found is not None
    assert f'BUILT = "{found[1]}"' in next(installed.glob("lib/nydusd/lib/*/site-packages/nydusd/build.py")).read_text()
    python = installed / "lib/nydusd/bin/python"
    where = subprocess.run(
        [python, "-P", "-c", "import nydusd, workers.loop; print(workers.loop.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))


def test_pages_completions_units_and_examples_are_there(installed: Path) -> None:
    for path in (
        "share/man/man8/nydusd.8",
        "share/man/man8/nydusctl.8",
        "share/bash-completion/completions/nydusctl",
        "share/zsh/site-functions/_nydusd",
        "share/doc/nydusd/examples/localfs-v2.toml",
        "share/doc/nydusd/metrics.md",
        "share/doc/nydusd/openapi.yaml",
        "share/doc/nydusd/erofs.svg",
        "etc/tmpfiles.d/nydusd.conf",
    ):
        assert (installed / path).stat().st_size > 0, path
    for path, verb in (
        ("etc/systemd/system/nydusd@.service", "fuse"),
        ("share/doc/nydusd/examples/nydusd-erofs.conf", "erofs"),
    ):
        assert f"ExecStart={installed}/bin/nydusd {verb}" in (installed / path).read_text()
    snapshotter = tomllib.loads((installed / "share/doc/nydusd/examples/nydus-snapshotter.toml").read_text())
    assert snapshotter["daemon"]["nydusd_path"] == f"{installed}/bin/nydusd"


def test_the_score_of_the_unit_is_the_one_of_the_docs(installed: Path) -> None:
    unit = installed / "etc/systemd/system/nydusd@.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True, check=False
    )
    score = re.search(r"Overall exposure level for .*: ([0-9.]+) ", done.stdout)
    assert score is not None, done.stderr
    assert f"`systemd-analyze security --offline=true` gives {score[1]};" in (ROOT / "docs/operating.md").read_text()


def test_installed_daemon_serves(installed: Path) -> None:
    daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs)
    daemon.command[:3] = [str(installed / "bin/nydusd")]
    with daemon:
        assert (daemon.mountpoint / "dup/a").read_bytes() == truth(IMAGE.name)[b"dup/a"]
        children = [Path(f"/proc/{pid}/maps").read_text() for pid in daemon.pids("decompress")]
        assert children
        assert all(str(installed) in maps and str(ROOT) not in maps for maps in children)


@pytest.mark.parametrize("example", ["localfs-v1.json", "localfs-v2.toml"])
def test_local_example_mounts_as_it_is(example: str, tmp_path: Path) -> None:
    name = f"nydusd-{tmp_path.parent.parent.name}-{example}"
    text = EXAMPLE.format(
        name=name,
        blobs=shlex.quote(str(IMAGE.blobs)),
        bootstrap=shlex.quote(str(IMAGE.bootstrap)),
        python=shlex.quote(sys.executable),
        example=example,
    )
    try:
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", text], cwd=ROOT, capture_output=True, timeout=60, check=False
        )
    finally:
        subprocess.run(["rm", "-rf", f"/tmp/{name}"], check=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == truth(IMAGE.name)[b"dup/a"]
    assert b".blob.data.chunk_map" in done.stderr


def settings(file: Path = UNIT) -> dict[str, str]:
    lines = file.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


@pytest.mark.parametrize(("file", "verb"), [(UNIT, "fuse"), (DROP_IN, "erofs")])
def test_unit_starts_what_the_command_line_takes(file: Path, verb: str) -> None:
    command = shlex.split(settings(file)["ExecStart"].replace("%i", "one"))
    assert command[:2] == ["@PREFIX@/bin/nydusd", verb]
    options = parse_arguments(command[1:])
    assert (options.config, options.apisock) == ("/etc/nydusd/one.toml", "/run/nydusd/one.sock")


def test_unit_neither_kills_front_ends_nor_hides_the_mount() -> None:
    found = settings()
    assert found["Type"] == "notify"
    assert found["KillMode"] == "process"
    assert int(found["WatchdogSec"]) > 0
    assert "RequiredBy" not in found
    namespace = re.compile(
        r"Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|Private(Tmp|Devices|Mounts|Users)"
        r"|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind\w*Paths|TemporaryFileSystem|MountFlags|Root\w+|ProcSubset"
    )
    assert [name for name in found if namespace.fullmatch(name)] == []


def test_daemon_works_under_what_the_unit_forbids() -> None:
    """No new privileges, no memory that is both writable and executable, none but the unit's capabilities."""
    found = settings()
    allowed = {name.removeprefix("CAP_").lower() for name in found["CapabilityBoundingSet"].split()}
    bounding = ",".join(["-all", *(f"+{name}" for name in sorted(allowed))])
    code = "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0; os.execvp(sys.argv[1], sys.argv[1:])"
    daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs)
    daemon.command[:0] = ["setpriv", "--no-new-privs", f"--bounding-set={bounding}", sys.executable, "-c", code]
    with daemon:
        for path, content in truth(IMAGE.name).items():
            assert Path(os.fsdecode(os.path.join(os.fsencode(daemon.mountpoint), path))).read_bytes() == content
        assert "318 of 318" in daemon.ctl("info") or "lazy" in daemon.ctl("info")
        daemon.ctl("cache", "gc", "--to", "0")
        daemon.kill(daemon.pids("fuse")[0])
        assert (daemon.mountpoint / "dup/a").read_bytes() == truth(IMAGE.name)[b"dup/a"]
        os.kill(daemon.pid, signal.SIGUSR1)
