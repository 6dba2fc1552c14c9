"""The jobs of a mount, `inspect`, `compare_tables` and `find_folder`.

Run in a fetch worker: they read a disk and parse what others wrote.
"""

from __future__ import annotations

from nydusd.ipc.messages import Json
from nydusd.storage.api.domain import additions
from nydusd.storage.api.image import ImageFacts, inspect, is_folder, make_folder
from workers.blobs import OpenBlobs


def inspect_image(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: source, folders (as of `metadata_folders`). Answer: `image`, as plain data."""
    for folder in job["folders"][:-1]:
        make_folder(folder)
    return {"image": inspect(job["source"], job["folders"]).to_json()}


def compare_tables(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: image and `others` (place, image) as plain data, domain. Answer: `adds`, see `additions`."""
    others = [(place, ImageFacts.from_json(facts)) for place, facts in job["others"]]
    return {"adds": sorted(additions(ImageFacts.from_json(job["image"]), others, job["domain"]))}


def find_folder(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: image (plain data), path (hex names). Answer: `found`, whether the image has a folder there."""
    return {"found": is_folder(ImageFacts.from_json(job["image"]), [bytes.fromhex(name) for name in job["path"]])}
