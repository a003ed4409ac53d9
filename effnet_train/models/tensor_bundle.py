"""Read TensorFlow's checkpoint files (tensor bundles) without TensorFlow, and hold them against their checksums.

Source: `tensorflow/core/util/tensor_bundle` and `tensorflow/core/protobuf/tensor_bundle.proto` for the bundle,
LevelDB's `doc/table_format.md` for its index, snappy's `format_description.txt` for compressed blocks of the index.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

BFLOAT16 = 14
# Numbers of tensorflow/core/framework/types.proto. numpy has no bfloat16: its bits are the upper half of a float32's.
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", BFLOAT16: "<u2", 19: "<f2"}

_FOOTER_SIZE, _MAGIC = 48, 0xDB4775248B80FB57
_TRAILER_SIZE = 5  # of a block: a byte that says how it is compressed, and the checksum
_LANES = 1 << 16  # words that crc32c folds at once: 256 KiB stay in the cache
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits mirrored
_START = bytes.fromhex("54641f64")  # takes the checksum's register from 0 to all ones, where it is to start


@dataclass(frozen=True)
class Entry:
    """Say where a tensor lies and what it is; `dtype` is TensorFlow's number."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    partitioned: bool


class Bundle(Mapping[str, np.ndarray]):
    """Map a checkpoint's names to its tensors; a tensor is read, and checked, when it is asked for.

    bfloat16 comes as float32. Raises: ValueError for a tensor that is damaged, or of a kind that is not read here.
    """

    def __init__(self, entries: Mapping[str, Entry], shards: list[Path]) -> None:
        self.entries = entries
        self.shards = shards

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        shard = self.shards[entry.shard]
        if entry.partitioned:
            raise ValueError(f"{name} of {shard} is cut into slices, which cannot be read: save it as one variable")
        if entry.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"{name} of {shard} has TensorFlow's dtype {entry.dtype}; read are {known}")
        dtype = np.dtype(DTYPES[entry.dtype])
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise _damaged(shard, f"{name} has {entry.size} bytes, which is not its shape {entry.shape}")
        data = np.fromfile(shard, np.uint8, count=entry.size, offset=entry.offset)
        if _masked(crc32c(data.tobytes())) != entry.checksum:
            raise _damaged(shard, f"the checksum of {name} is wrong")
        values = data.view(dtype)
        if entry.dtype == BFLOAT16:
            values = (values.astype("<u4") << 16).view("<f4")
        return values.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.entries[name].shape


def read_bundle(prefix: Path) -> Bundle:
    """Open the checkpoint of files `prefix.index` and `prefix.data-*-of-*`.

    Raises: FileNotFoundError for a file that is absent, ValueError for one that is damaged or cut short.
    """
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise FileNotFoundError(
            f"{index} does not exist: give a TensorFlow checkpoint as what stands before .index and .data-*-of-*"
        )
    try:
        table = read_table(index.read_bytes())
        count = _number_of_shards(table.pop(b"", b""))
        entries = {key: _entry(value) for key, value in table.items()}
        # A key that begins with 0 is that of a slice, whose bounds are a part of it.
        named = {key.decode(): entry for key, entry in entries.items() if not key.startswith(b"\0")}
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise _damaged(index, str(error)) from error
    shards = []
    for i in range(count):
        shard = Path(f"{prefix}.data-{i:05d}-of-{count:05d}")
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist: {index} says that {count} such files belong to it")
        expected = max((entry.offset + entry.size for entry in entries.values() if entry.shard == i), default=0)
        if (size := shard.stat().st_size) < expected:
            raise _damaged(shard, f"it has {size} bytes where {index.name} says at least {expected}")
        shards.append(shard)
    if any(entry.shard >= count for entry in entries.values()):
        raise _damaged(index, f"a tensor lies in more than the {count} files there are")
    return Bundle(named, shards)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): copy or download it again")


def _number_of_shards(header: bytes) -> int:
    fields = dict(_fields(header))
    if fields.get(2, 0) != 0:
        raise ValueError("its numbers are big-endian")
    count = fields.get(1, 0)
    if not isinstance(count, int) or count < 1:
        raise ValueError("it has no header that says how many data files there are")
    return count


def _entry(data: bytes) -> Entry:
    """Decode a BundleEntryProto."""
    fields = dict(_fields(data))
    dims = [dict(_fields(dim)).get(1, 0) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    numbers = [fields.get(number, 0) for number in (1, 3, 4, 5, 6)]
    if not all(isinstance(number, int) for number in (*numbers, *dims)):
        raise ValueError("what it says of a tensor is not in numbers")
    dtype, shard, offset, size, checksum = numbers
    return Entry(dtype, tuple(dims), shard, offset, size, checksum, partitioned=7 in fields)


def read_table(data: bytes) -> dict[bytes, bytes]:
    """Decode a LevelDB table, the checksums of its blocks included.

    Raises: ValueError, IndexError or struct.error where it is damaged.
    """
    if len(data) < _FOOTER_SIZE or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("it does not end as such a file ends: it is cut short, or another kind of file")
    footer = data[-_FOOTER_SIZE:]
    _, at = _handle(footer, 0)  # of the block about blocks, of which a checkpoint has none
    (offset, size), _ = _handle(footer, at)
    table: dict[bytes, bytes] = {}
    for _, handle in _pairs(_block(data, offset, size)):
        table.update(_pairs(_block(data, *_handle(handle, 0)[0])))
    return table


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return a block's place and size, and where to read on."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER_SIZE > len(data):
        raise ValueError(f"it has {len(data)} bytes, and a block at byte {offset} that is to have {size}")
    compression, checksum = struct.unpack("<BI", data[end : end + _TRAILER_SIZE])
    if _masked(crc32c(data[offset : end + 1])) != checksum:
        raise ValueError(f"the checksum of the block at byte {offset} is wrong")
    if compression not in (0, 1):
        raise ValueError(f"the block at byte {offset} is compressed in a way numbered {compression}")
    return uncompress(data[offset:end]) if compression else data[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield a block's keys and values; a key is stored without what it shares with the one before."""
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        size, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number in seven bits a byte, the lowest first, and where to read on."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the numbers and values of a protocol buffer's fields: integers, or bytes."""
    at = 0
    value: int | bytes
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        else:
            raise ValueError(f"a field is of the kind {kind}")
        yield tag >> 3, value


def uncompress(data: bytes) -> bytes:
    """Decompress a snappy block. Raises: ValueError or IndexError where it is damaged."""
    length, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        kind, size = tag & 3, tag >> 2
        at += 1
        if kind == 0:
            if size >= 60:  # the size itself follows, in one to four bytes
                extra = size - 59
                size, at = int.from_bytes(data[at : at + extra], "little"), at + extra
            out += data[at : at + size + 1]
            at += size + 1
            continue
        if kind == 1:
            size, back, at = size & 7, (tag >> 5) << 8 | data[at], at + 1
            size += 3
        else:
            width = 2 if kind == 2 else 4
            back, at = int.from_bytes(data[at : at + width], "little"), at + width
        size += 1
        if not 0 < back <= len(out):
            raise ValueError("a compressed block refers to before its beginning")
        piece = out[-back:]  # where the copy overlaps what it makes, it repeats
        out += (piece * -(-size // back))[:size]
    if len(out) != length:
        raise ValueError(f"a compressed block gives {len(out)} bytes instead of {length}")
    return bytes(out)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C checksum (RFC 3720).

    A register that runs on over zeros changes linearly, so registers of pieces can be computed side by side: words that
    lie `n` apart are folded, the earlier one advanced by `n` words of zeros. numpy does 65,536 at once, at several
    hundred MB/s; a loop over bytes would take minutes for a network's weights.
    """
    words = -(-(len(_START) + len(data)) // 4)
    lanes = min(1 << (words - 1).bit_length(), _LANES)
    # Zeros in front leave a register at 0.
    padded = (_START + data).rjust(-(-words // lanes) * lanes * 4, b"\0")
    rows = np.frombuffer(padded, "<u4").reshape(-1, lanes)
    registers = rows[0]
    for row in rows[1:]:
        registers = _advanced(registers, lanes) ^ row
    while lanes > 1:
        lanes //= 2
        registers = _advanced(registers[:lanes], lanes) ^ registers[lanes:]
    return int(_advanced(registers, 1)[0]) ^ 0xFFFFFFFF


def _advanced(registers: np.ndarray, words: int) -> np.ndarray:
    """Advance registers by a number of words of zeros, a power of two."""
    table = _table(words)
    octets = registers[..., None].view(np.uint8)
    result = table[0].take(octets[..., 0])
    for i in (1, 2, 3):
        result ^= table[i].take(octets[..., i])
    return result


@cache
def _table(words: int) -> np.ndarray:
    """Return the advanced registers of every byte in each of the four places: (4, 256) uint32."""
    if words > 1:
        return _advanced(_table(words // 2), words // 2)
    table = np.arange(256, dtype="<u4") << np.arange(0, 32, 8, dtype="<u4")[:, None]
    for _ in range(32):
        table = (table >> 1) ^ (table & 1) * np.uint32(_POLYNOMIAL)
    return table


def _masked(checksum: int) -> int:
    """Return a checksum as these files store it. Source: LevelDB's `util/crc32c.h`."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
