"""The Debian package: built, installed by dpkg over a throw-away copy of this system, and used there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nydusd.version import VERSION
from tests.support.oracle import image, truth

ROOT = Path(__file__).resolve().parents[1]
IMAGE = image("v6-zstd-blake3")

SYSTEM = """
set -e
work=$1 package=$2 blobs=$3 bootstrap=$4
mount -t tmpfs none "$work"
mkdir "$work/upper" "$work/own" "$work/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/own" "$work/root"
cd "$work/root"
mount --rbind /dev dev
mount -t proc none proc
mount -t tmpfs none run
mount -t tmpfs none var/lib/nydus 2>/dev/null || { mkdir var/lib/nydus && mount -t tmpfs none var/lib/nydus; }
cp "$package" run/nydusd.deb
cp -r "$blobs" var/lib/nydus/blobs
cp "$bootstrap" var/lib/nydus/bootstrap
mkdir run/mnt
exec chroot . /bin/sh -c "$5"
"""
USE = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd /
dpkg -i /run/nydusd.deb >/dev/null
dpkg --verify nydusd
nydusd --version
man=$(zcat /usr/share/man/man8/nydusd.8.gz | head -c 1)
test -n "$man"
bash -c '. /usr/share/bash-completion/completions/nydusctl'
test -s /usr/lib/systemd/system/nydusd@.service
nydusd fuse --config /usr/share/doc/nydusd/examples/localfs-v2.toml --bootstrap /var/lib/nydus/bootstrap \
    --mountpoint /run/mnt --apisock /run/api.sock &
until nydusctl --sock /run/api.sock info >/run/info 2>/dev/null; do kill -0 $!; sleep 0.05; done
cat /run/mnt/dup/a >/run/read
grep -q RUNNING /run/info
kill $!
wait $!
dpkg -P nydusd >/dev/null
test ! -e /usr/lib/nydusd
cat /run/read
"""


@pytest.mark.timeout(280)
def test_it_is_built_installed_used_and_removed(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    copy.mkdir()
    for path in ROOT.iterdir():  # it writes to `dist`, `build` and `*.egg-info`: not those of the checkout
        if path.name not in ("dist", "build", ".git", "nydusd.egg-info"):
            (copy / path.name).symlink_to(path)
    (copy / "scripts").unlink()
    (copy / "scripts").mkdir()
    for name in ("deb", "install"):
        (copy / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
        (copy / "scripts" / name).chmod(0o755)
    built = subprocess.run([copy / "scripts/deb"], capture_output=True, text=True, check=True, timeout=200).stdout
    package = copy / built.strip()
    work = tmp_path / "system"
    work.mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", SYSTEM, "system"]
    done = subprocess.run(
        [*command, work, package, IMAGE.blobs, IMAGE.bootstrap, USE], capture_output=True, timeout=80, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    shown = truth(IMAGE.name)[b"dup/a"]
    assert done.stdout.endswith(shown)
    assert VERSION in done.stdout.removesuffix(shown).decode()
