"""`nydus-image chunkdict generate`: what images have in common, in a dictionary that builders take chunks from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nydusd.image.reader import load_metadata
from tests.image.build import create, image, refused, rows
from tests.support import manifest, oracle


def versions(tmp_path: Path, *options: str) -> list[Path]:
    """Metadata of three images over one folder of blobs: a file of all of them, one of two, one of each alone."""
    source = random.Random(3)
    common, some = source.randbytes(150_000), source.randbytes(70_000)
    made = []
    for number in range(3):
        tree = tmp_path / f"tree{number}"
        tree.mkdir()
        (tree / "common").write_bytes(common)
        (tree / "own").write_bytes(source.randbytes(30_000))
        if number:
            (tree / "some").write_bytes(some)
        made.append(create(tree, tmp_path, "--chunk-size", "0x10000", *options).rename(tmp_path / f"image{number}"))
    return made


@pytest.mark.parametrize("version", ["5", "6"])
def test_image_of_a_new_version_refers_to_the_dictionary(tmp_path: Path, version: str) -> None:
    images = versions(tmp_path, "-v", version)
    dictionary = tmp_path / "dictionary"
    text = image("chunkdict", "generate", "--bootstrap", dictionary, "-J", tmp_path / "out.json", *images)
    # Those of the first blob, and of the second what the first has not: the third has nothing that is shared but those.
    assert text.startswith("7 chunks of 2 blobs\n")
    blobs = tmp_path / "blobs"
    assert "10 names" in image("check", dictionary, "-D", blobs)
    _, parsed = load_metadata(dictionary)
    firsts = [load_metadata(path)[1].blobs[0].blob_id for path in images]
    assert (
        [blob.blob_id for blob in parsed.blobs]
        == firsts[:2]
        == json.loads((tmp_path / "out.json").read_text())["blobs"]
    )

    tree = tmp_path / "next"
    tree.mkdir()
    for name, old in (("common", 0), ("some", 2), ("new", 2)):
        (tree / name).write_bytes((tmp_path / f"tree{old}" / name.replace("new", "own")).read_bytes())
    made = create(tree, tmp_path, "-v", version, "--chunk-size", "0x10000", "--chunk-dict", f"bootstrap={dictionary}")
    _, built = load_metadata(made)
    own = [blob for blob in built.blobs if blob.blob_id not in firsts[:2]]
    assert len(built.blobs) == 3 and len(own) == 1
    assert own[0].chunk_count == 1  # `new`, which is in the third image alone
    assert manifest.differences(manifest.walk(tree), rows(made, blobs)) == []


def test_of_one_image_every_chunk_is_taken(tmp_path: Path) -> None:
    first, *_ = versions(tmp_path)
    image("chunkdict", "generate", "-B", tmp_path / "dictionary", "--database", "sqlite:///x", first)
    digests = [
        {chunk.digest for chunk in load_metadata(path)[1].raw_chunks()} for path in (first, tmp_path / "dictionary")
    ]
    assert digests[0] == digests[1]


def test_images_that_share_nothing_are_refused(tmp_path: Path) -> None:
    first, second, _ = versions(tmp_path)
    other = create(tmp_path / "tree0", tmp_path / "other", "-v", "5", "--chunk-size", "0x10000")
    hashed = create(tmp_path / "tree0", tmp_path / "hashed", "--digester", "sha256", "--chunk-size", "0x10000")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "file").write_bytes(b"nobody else has this")
    lonely = create(alone, tmp_path / "lonely", "--chunk-size", "0x10000")
    target = tmp_path / "dictionary"
    for images, words in (
        ((first, other), "an image of version 5; the new one has 6"),
        ((first, hashed), "another digest algorithm"),
        ((first, oracle.image("v6-tarfs").bootstrap), "chunks of"),
        ((first, lonely), "no chunk is in two of the images"),
        ((first, tmp_path / "tree0" / "own"), "own"),
    ):
        assert words in refused("chunkdict", "generate", "-B", target, *images)
        assert not target.exists()
    assert "--bootstrap is needed" in refused("chunkdict", "generate", first, second)
