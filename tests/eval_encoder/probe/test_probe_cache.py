"""The feature cache: what was damaged is named and made again, never used, and ends no run."""

import random
import shutil

import numpy as np
import pytest
import torch

from eval_encoder import feature_cache as probe_cache
from eval_encoder.clip_views import Look
from eval_encoder.feature_cache import FeatureCache

LOOK = Look(0)
FEATURES = torch.arange(6 * 8, dtype=torch.float16).reshape(6, 8)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, {"encoder": "e"}, memory_bytes=0, identity=str)


@pytest.fixture
def entry(cache, tmp_path):
    """The file of the one look that is stored."""
    cache.put(LOOK, FEATURES, comes_again=False)
    (path,) = tmp_path.rglob("??/*.npy")
    return path


def test_features_come_back_bit_for_bit_and_numpy_reads_an_entry_too(cache, entry):
    assert torch.equal(cache.get(LOOK, comes_again=False), FEATURES)
    assert np.array_equal(np.load(entry), FEATURES.numpy())


def test_no_flip_of_120_is_used_and_each_is_said_and_made_again_bitwise_equal(cache, entry, caplog):
    written = entry.read_bytes()
    draw = random.Random(0)
    header = [draw.randrange(8 * 128) for _ in range(40)]  # NumPy pads its header to 128 bytes
    for bit in header + [draw.randrange(8 * len(written)) for _ in range(80)]:
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(flipped)
        caplog.clear()
        assert cache.get(LOOK, comes_again=False) is None
        (said,) = caplog.messages
        assert f"stored features {entry} are made again: it changed" in said
        assert not cache.has(LOOK), "whoever looks next makes it"
        cache.put(LOOK, FEATURES, comes_again=False)
        assert entry.read_bytes() == written


def test_a_damaged_entry_that_cannot_be_removed_is_logged_with_both_causes(
    cache, entry, monkeypatch, caplog
):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    entry.write_bytes(entry.read_bytes()[:-1])
    monkeypatch.setattr(type(entry), "unlink", refuse)
    assert cache.get(LOOK, comes_again=False) is None
    (logged,) = caplog.messages
    assert "it changed since it was written, and cannot be removed (Permission denied)" in logged


@pytest.mark.parametrize("length", [0, 10, 31, 32, 100, -1])
def test_a_cut_entry_is_not_used(cache, entry, length):
    entry.write_bytes(entry.read_bytes()[:length])
    assert cache.get(LOOK, comes_again=True) is None


def test_an_entry_in_the_place_of_another_is_not_used(cache, entry, tmp_path):
    other = Look(1)
    cache.put(other, FEATURES + 1, comes_again=False)
    (place,) = set(tmp_path.rglob("??/*.npy")) - {entry}
    shutil.copy(entry, place)
    assert cache.get(other, comes_again=False) is None
    assert torch.equal(cache.get(LOOK, comes_again=False), FEATURES)


@pytest.mark.parametrize("kind", ["folder", "endless link", "memory that nobody may read"])
def test_what_cannot_be_read_or_written_is_said_and_ends_nothing(cache, entry, kind, caplog):
    entry.unlink()
    if kind == "folder":
        entry.mkdir()
        (entry / "of a user").touch()
    elif kind == "endless link":
        entry.symlink_to(entry)
    else:
        entry.symlink_to("/proc/self/mem")  # reading at 0 is an input/output error
    assert cache.get(LOOK, comes_again=False) is None
    assert str(entry) in caplog.text
    cache.put(LOOK, FEATURES, comes_again=False)
    if kind == "folder":
        assert "cannot be stored" in caplog.text and (entry / "of a user").exists()
        assert cache.get(LOOK, comes_again=False) is None
    else:  # the link was replaced, not what it names
        assert torch.equal(cache.get(LOOK, comes_again=False), FEATURES)


def test_a_cache_that_cannot_be_written_is_said_once_and_memory_still_answers(tmp_path, caplog):
    cache = FeatureCache(tmp_path / "features", {}, memory_bytes=1 << 20, identity=str)
    shutil.rmtree(tmp_path / "features")
    for number in range(3):
        cache.put(Look(number), FEATURES + number, comes_again=True)
        assert torch.equal(cache.get(Look(number), comes_again=True), FEATURES + number)
    assert caplog.text.count("cannot be stored") == 1


@pytest.mark.parametrize("damage", ["a byte", "a folder"])
def test_a_key_that_changed_is_said_and_written_again_where_possible(tmp_path, damage, caplog):
    def opened():
        FeatureCache(tmp_path, {"encoder": "e"}, memory_bytes=0, identity=str)

    opened()
    (key,) = tmp_path.rglob("key.json")
    written = key.read_bytes()
    key.unlink()
    if damage == "a byte":
        key.write_bytes(written.replace(b"e", b"d", 1))
    else:
        key.mkdir()
    opened()
    assert str(key) in caplog.text
    assert key.is_dir() or key.read_bytes() == written


def test_entries_of_an_older_format_are_not_looked_at(cache, entry, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_cache, "ENTRY_FORMAT", probe_cache.ENTRY_FORMAT + 1)
    later = FeatureCache(tmp_path, {"encoder": "e"}, memory_bytes=0, identity=str)
    assert not later.has(LOOK) and cache.has(LOOK)
