"""Manifests: what they hold, and every kind of damage they find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from mesh_megatron.checkpoint.manifest import MANIFEST, find_damage, read_manifest, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    (tmp_path / ".metadata").write_bytes(b"index")
    seal(tmp_path)
    return tmp_path


def test_holds_every_file_and_finds_nothing_wrong(folder):
    files = read_manifest(folder)
    assert set(files) == {"__0_0.distcp", ".metadata"}
    content = (folder / "__0_0.distcp").read_bytes()
    assert files["__0_0.distcp"] == {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    assert find_damage(folder, "size") == find_damage(folder, "hash") == []
    seal(folder)
    assert MANIFEST not in read_manifest(folder)


def test_hashing_tells_how_far_it_is(folder):
    counts: list[int] = []
    assert find_damage(folder, "hash", counts.append) == []
    assert sum(counts) == 256 * 40 + len(b"index")


def test_a_flipped_bit_is_found_by_its_hash_alone(folder):
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    assert find_damage(folder, "size") == []
    assert find_damage(folder, "hash") == ["__0_0.distcp does not match its hash"]


@pytest.mark.parametrize("how", ["size", "hash"])
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
        (lambda folder: (folder / ".metadata").write_bytes(b"ind"), ".metadata has 3 bytes instead of 5"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": {}}}'), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(b""), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text(json.dumps([1])), "manifest.json is damaged"),
    ],
)
def test_damage_is_named(folder, damage, found, how):
    damage(folder)
    assert find_damage(folder, how) == [found]


def test_a_folder_that_is_not_there(tmp_path):
    assert find_damage(tmp_path / "nowhere") == ["there is no such folder"]
