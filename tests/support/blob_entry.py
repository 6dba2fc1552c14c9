"""What a client puts to `/api/v2/blobs` for an image whose blobs are in a local folder. Imports nothing that a guest lacks."""

from __future__ import annotations

from pathlib import Path


def blob_entry(
    name: str, bootstrap: Path, blobs: Path, work_dir: Path, domain: str, cache_type: str = "filecache"
) -> dict[str, object]:
    return {
        "type": "bootstrap",
        "id": name,
        "domain_id": domain,
        "config": {
            "id": name,
            "backend_type": "localfs",
            "backend_config": {"dir": str(blobs)},
            "cache_type": cache_type,
            "cache_config": {"work_dir": str(work_dir)},
            "metadata_path": str(bootstrap),
        },
    }
