import struct
from pathlib import Path

import numpy as np
import pytest

from effnet_train.models.tensor_bundle import crc32c, read_bundle, read_table, uncompress

GOLDEN = np.load(Path(__file__).parents[1] / "golden/tf_checkpoint.npz")
TENSORS = sorted(name.removeprefix("dtypes/") for name in GOLDEN.files if name.startswith("dtypes/"))
INDEX = GOLDEN["files/dtypes.index"].tobytes()


@pytest.fixture
def prefix(tmp_path):
    """Return a checkpoint written by TensorFlow: its files but for their endings."""
    for name in ("dtypes.index", "dtypes.data-00000-of-00001"):
        (tmp_path / name).write_bytes(GOLDEN[f"files/{name}"].tobytes())
    return tmp_path / "dtypes"


@pytest.fixture
def shard(prefix):
    return Path(f"{prefix}.data-00000-of-00001")


def bytewise_crc32c(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    return register ^ 0xFFFFFFFF


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << at % 8
    file.write_bytes(data)


def refusal(prefix):
    try:
        read_bundle(prefix)
    except ValueError as error:
        return str(error)
    return None


def test_every_tensor_is_tensorflows(prefix):
    bundle = read_bundle(prefix)
    assert sorted(bundle) == sorted([*TENSORS, "bool", "sliced", "text"])
    for name in TENSORS:
        expected = GOLDEN[f"dtypes/{name}"]
        assert name in bundle
        assert bundle.shape(name) == expected.shape
        values = bundle[name]
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected, strict=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("text", "has TensorFlow's dtype 7"), ("bool", "dtype 10"), ("sliced", "is cut into slices")],
)
def test_what_is_not_read_is_refused_when_asked_for(prefix, name, message):
    with pytest.raises(ValueError, match=rf"{name} of .*dtypes\.data-00000-of-00001 .*{message}"):
        read_bundle(prefix)[name]


def test_unknown_name(prefix):
    assert "float33" not in read_bundle(prefix)
    with pytest.raises(KeyError, match="float33"):
        read_bundle(prefix)["float33"]


def test_a_leveldb_table_of_many_compressed_blocks():
    file, content = GOLDEN["files/table.ldb"].tobytes(), GOLDEN["table/bytes"].tobytes()
    assert len(file) < len(content) / 2  # it is compressed
    expected, at = {}, 0
    for key, value in GOLDEN["table/lengths"]:
        expected[content[at : at + key]] = content[at + key : at + key + value]
        at += key + value
    # LevelDB itself adds eight bytes to a key, which say when it was written.
    assert {key[:-8]: value for key, value in read_table(file).items()} == expected


@pytest.mark.parametrize(
    ("data", "checksum"),
    [  # RFC 3720, appendix B.4; then the algorithm's usual check value
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_published_checksums(data, checksum):
    assert crc32c(data) == checksum


@pytest.mark.parametrize("size", [*range(20), 255, 4 * 65536 - 4, 4 * 65536 - 3, 4 * 65536 + 5])
def test_checksum_of_any_length(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bytewise_crc32c(data)


@pytest.mark.parametrize(
    ("compressed", "expected"),
    [  # worked out from snappy's format description: literals, and copies with offsets of 1, 2 and 4 bytes
        (b"\x00", b""),
        (b"\x03\x08abc", b"abc"),
        (b"\x46\xf0\x45" + bytes(70), bytes(70)),
        (b"\x80\x02\xf4\xff\x00" + b"z" * 256, b"z" * 256),
        (b"\x0a\x04ab\x11\x02", b"ab" * 5),
        (b"\x0b\x08abc\x1e\x03\x00", b"abcabcabcab"),
        (b"\x04\x00x\x0b\x01\x00\x00\x00", b"xxxx"),
    ],
)
def test_uncompress(compressed, expected):
    assert uncompress(compressed) == expected


@pytest.mark.parametrize(
    "compressed", [b"\x04\x08abc", b"\x04\x08abc\x01\x00", b"\x08\x08abc\x05\x04", b"\x05\x08abc\x01"]
)
def test_damaged_compression(compressed):
    with pytest.raises((ValueError, IndexError)):
        uncompress(compressed)


def test_any_flipped_bit_in_the_index_is_found_or_has_no_meaning(prefix):
    index, unnoticed = Path(f"{prefix}.index"), 0
    expected = read_bundle(prefix).entries
    for at in range(len(INDEX)):
        flip(index, at)
        reason = refusal(prefix)
        if reason is None:
            assert read_bundle(prefix).entries == expected
            unnoticed += 1
        else:
            assert reason.startswith(f"{index} is damaged (")
            assert reason.endswith("): copy or download it again")
        index.write_bytes(INDEX)
    # Only the block about blocks, which is empty, its place and the padding of the footer are not looked at.
    assert unnoticed < 60


def test_any_length_of_the_index_but_the_whole_is_refused(prefix):
    index = Path(f"{prefix}.index")
    for size in range(len(INDEX)):
        index.write_bytes(INDEX[:size])
        with pytest.raises(ValueError, match=r"dtypes\.index is damaged \(.*\): copy or download it again"):
            read_bundle(prefix)


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_a_flipped_bit_in_a_tensor(prefix, shard, name):
    entry = read_bundle(prefix).entries[name]
    flip(shard, entry.offset + entry.size // 2)
    bundle = read_bundle(prefix)
    with pytest.raises(ValueError, match=rf"{shard} is damaged \(the checksum of {name} is wrong\): copy or download"):
        bundle[name]
    for other in TENSORS:
        if other != name:
            np.testing.assert_array_equal(bundle[other], GOLDEN[f"dtypes/{other}"])


def test_a_shard_cut_short(prefix, shard):
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{shard} is damaged \(it has {len(data) - 1} bytes where dtypes.index says"):
        read_bundle(prefix)


def test_absent_files(prefix, shard):
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard} does not exist: .*dtypes\.index says that 1 such files"):
        read_bundle(prefix)
    with pytest.raises(FileNotFoundError, match=r"other\.index does not exist: give a TensorFlow checkpoint as what"):
        read_bundle(prefix.with_name("other"))


def test_another_kind_of_file(prefix):
    Path(f"{prefix}.index").write_bytes(b"PK" + bytes(1000))
    with pytest.raises(ValueError, match=r"is damaged \(it does not end as such a file ends"):
        read_bundle(prefix)


def test_a_table_without_a_header_is_refused(prefix):
    # A LevelDB file is whole, but says nothing of data files.
    Path(f"{prefix}.index").write_bytes(GOLDEN["files/table.ldb"].tobytes())
    with pytest.raises(ValueError, match=r"is damaged \("):
        read_bundle(prefix)


def test_the_footer_is_where_the_format_has_it():
    assert struct.unpack("<Q", INDEX[-8:])[0] == 0xDB4775248B80FB57
