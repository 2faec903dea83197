"""Arrays that were crafted, or that somebody else wrote: each fault is one exception, which the
loader quarantines and a command prints.
"""

import zipfile

import numpy as np
import pytest

from data_pipeline.clustering.labels import import_labels
from data_pipeline.datasets import start_centers
from data_pipeline.errors import CorruptShard, DataPipelineError
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.side_files import array_bytes, parse_array


def npy(header: bytes, data: bytes = b"") -> bytes:
    """A .npy file of version 1.0 with this header."""
    line = header + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + data


def with_shape(shape: bytes, descr: bytes = b"<f4", data: bytes = b"") -> bytes:
    return npy(b"{'descr': '%s', 'fortran_order': False, 'shape': (%s), }" % (descr, shape), data)


@pytest.mark.parametrize(
    "data",
    [
        with_shape(b"1 2,", data=bytes(48)),
        with_shape(b"9" * 5000 + b","),
        with_shape(b"0, " + b"9" * 39),
        with_shape(b"0, " + b"9" * 18 + b", " + b"9" * 18),
        with_shape(b", ".join([b"1"] * 70), data=bytes(4)),
        with_shape(b"1,", descr=b"\xff\xfe", data=bytes(4)),
        with_shape(b",", data=bytes(4)),
    ],
    ids=["space", "digits", "size", "product", "dimensions", "descr", "comma"],
)
def test_a_crafted_header_is_a_corrupt_shard(data):
    with pytest.raises(CorruptShard, match="it"):
        parse_array(data, np.float32, name="it")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (1, 1, 1)])
def test_headers_as_numpy_writes_them_are_read(shape):
    array = np.ones(shape, np.float32)
    assert np.array_equal(parse_array(array_bytes(array), np.float32, name="it"), array)


def cut_npz() -> bytes:
    return b"PK\x03\x04" + bytes(100)


FOREIGN = {
    "npz": cut_npz(),
    "token": npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1L, }"),
    "overflow": with_shape(b"9" * 400 + b",", descr=b"<i8"),
    "memory": with_shape(b"1000000000000000,", descr=b"<i8"),
    "object": with_shape(b"1,", descr=b"|O"),
    "empty": b"",
    "text": b"1 2 3\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_users_file_that_is_no_array_is_named(packed, tmp_path, name):
    path = tmp_path / "mine.npy"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(DataPipelineError, match=r"mine\.npy"):
        start_centers(path)
    with pytest.raises(DataPipelineError, match=r"mine\.npy"):
        import_labels(load_manifest(packed / "train"), path=path, num_classes=3, width=2)


def test_several_arrays_in_one_file_are_refused_by_name(tmp_path):
    path = tmp_path / "mine.npy"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", array_bytes(np.zeros(3)))
    with pytest.raises(DataPipelineError, match=r"mine\.npy holds several arrays \(npz\)"):
        start_centers(path)
