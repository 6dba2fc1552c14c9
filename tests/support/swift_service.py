"""OpenStack Swift with its S3 API: a real object store that checks signatures. Run as a process of its own.

`swift_service.py FOLDER …` keeps everything below FOLDER, listens on a free port of 127.0.0.1, prints the port
as a line and serves until its standard input ends. Account, container, object and proxy server are Swift's own; only
what their deployment needs (ring files, configuration) is made here, and no daemon besides is started.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import eventlet  # type: ignore[import-untyped] # noqa: E402

eventlet.monkey_patch()

from eventlet import greenio, wsgi  # noqa: E402
from swift.common import utils  # type: ignore[import-untyped] # noqa: E402

SERVERS = ("account", "container", "object", "proxy-server")

CONFIG = """\
[DEFAULT]
swift_dir = {folder}/etc
devices = {folder}/node
mount_check = false
user = root
log_level = CRITICAL
[pipeline:main]
pipeline = {pipeline}
[app:{name}]
use = egg:swift#{egg}
account_autocreate = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:s3api]
use = egg:swift#s3api
location = {region}
storage_domain = {domain}
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
"""


def main(folder: Path, region: str, domain: str, key_id: str, secret: str) -> None:
    etc = folder / "etc"
    (folder / "node" / "disk").mkdir(parents=True)
    etc.mkdir()
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = x\n[storage-policy:0]\nname = x\ndefault = yes\n"
    )
    utils.set_swift_dir(str(etc))

    from swift.common.ring import RingBuilder  # type: ignore[import-untyped]
    from swift.common.storage_policy import reload_storage_policies  # type: ignore[import-untyped]
    from swift.common.wsgi import loadapp  # type: ignore[import-untyped]

    reload_storage_policies()
    sockets = {name: eventlet.listen(("127.0.0.1", 0)) for name in SERVERS}
    for name in SERVERS[:3]:
        builder = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
        port = sockets[name].getsockname()[1]
        device = {"region": 1, "zone": 1, "weight": 1.0, "device": "disk", "ip": "127.0.0.1", "port": port}
        builder.add_dev({**device, "replication_ip": "127.0.0.1", "replication_port": port})
        builder.rebalance()
        builder.get_ring().save(str(etc / f"{name}.ring.gz"))
    pool = eventlet.GreenPool()
    for name, sock in sockets.items():
        pipeline = "cache s3api tempauth proxy-server" if name == "proxy-server" else name
        user = key_id.replace(":", "_")
        text = CONFIG.format(
            folder=folder, name=name, egg=name.partition("-")[0], pipeline=pipeline, region=region, domain=domain,
            user=user, secret=secret,
        )  # fmt: skip
        (etc / f"{name}.conf").write_text(text)
        app = loadapp(str(etc / f"{name}.conf"), global_conf={"log_name": name})
        pool.spawn(wsgi.server, sock, app, utils.NullLogger(), max_size=64)
    print(sockets["proxy-server"].getsockname()[1], flush=True)
    greenio.GreenPipe(sys.stdin.fileno(), "rb").read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:6])
