"""An image file -> nothing, or the sentence that refuses it: is every byte there that its header promises?

SimpleITK reads a truncated `.nii`, `.nii.gz` or `.bmp`, and a damaged compressed `.mha` or `.nrrd`, without complaint.
Each check reads the file once, in small pieces; compressed streams are verified to their checksum.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from autoseg.errors import DatasetError

CHUNK_BYTES = 1 << 16  # compressed bytes at a time; zeros unpack to a thousand times as much
PLAIN_CHUNK_BYTES = 1 << 22
GZIP_MAGIC = b"\x1f\x8b"
NIFTI1_HEADER_BYTES, NIFTI2_HEADER_BYTES = 348, 540
NIFTI_FLOATS = {16: "f4", 64: "f8"}  # data type code -> NumPy's name
NIFTI_OFFSET_LIMIT = 1e9  # bytes of header extensions
HEADER_LIMIT_BYTES = 1 << 20  # text headers (MetaImage, NRRD) are far shorter

META_TYPE_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "LONG": 4}
META_TYPE_BYTES |= {"ULONG": 4, "DOUBLE": 8, "LONG_LONG": 8, "ULONG_LONG": 8}
NRRD_TYPE_BYTES = {
    1: "signed char|int8|int8_t|uchar|unsigned char|uint8|uint8_t",
    2: "short|short int|signed short|signed short int|int16|int16_t|ushort|unsigned short|unsigned short int|uint16|"
    "uint16_t",
    4: "int|signed int|int32|int32_t|uint|unsigned int|uint32|uint32_t|float",
    8: "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t|ulonglong|"
    "unsigned long long|unsigned long long int|uint64|uint64_t|double",
}

TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}
TIFF_OFFSETS = {273: 279, 324: 325}  # where strips and tiles are -> how long they are


def check_nifti(path: Path) -> None:
    """Refuse a NIfTI file, compressed or not, whose header or voxels are not all there, or not numbers.

    ITK's reader puts zeros where a NIfTI file holds NaN or infinity, so that nobody would see them later.
    Raises DatasetError.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    pieces = _unpacked(path, 0, zlib.MAX_WBITS | 16) if compressed else _plain(path)
    content = b""
    for piece in pieces:
        content += piece
        if len(content) >= NIFTI1_HEADER_BYTES:
            break
    header = _nifti_header(path, content[:NIFTI1_HEADER_BYTES])
    if not compressed and header.floats is None:
        _check_size(path, path.stat().st_size - header.offset, header.voxel_bytes)
        return
    found, unusable, rest = 0, 0, b""
    for piece in itertools.chain([content], pieces):
        # the part of this piece that is voxels, together with the bytes of a voxel cut in two before
        begin, end = max(header.offset - found, 0), header.offset + header.voxel_bytes - found
        found += len(piece)
        if header.floats is not None:
            rest += piece[begin : max(end, 0)]
            usable = len(rest) - len(rest) % header.floats.itemsize
            values = np.frombuffer(rest[:usable], header.floats)
            unusable += values.size - int(np.isfinite(values).sum())
            rest = rest[usable:]
    _check_size(path, found - header.offset, header.voxel_bytes)
    if unusable:
        raise DatasetError(
            f"{path}: {unusable} of {header.voxels} voxels are NaN or infinite; replace them by a value that makes "
            "sense for the image."
        )


@dataclass(frozen=True)
class _NiftiHeader:
    """What the checks need of a NIfTI-1 header."""

    offset: int
    """Where the voxels begin."""
    voxels: int
    voxel_bytes: int
    """Bytes of all voxels."""
    floats: np.dtype[Any] | None
    """The type of the voxels if it has NaN."""


def _nifti_header(path: Path, header: bytes) -> _NiftiHeader:
    if len(header) < NIFTI1_HEADER_BYTES:
        raise DatasetError(
            f"{path}: not a NIfTI image, or cut off in its header: {len(header)} bytes, expected at least "
            f"{NIFTI1_HEADER_BYTES}; copy the file again."
        )
    order = next((o for o in "<>" if struct.unpack_from(o + "i", header)[0] == NIFTI1_HEADER_BYTES), None)
    if order is None:
        if NIFTI2_HEADER_BYTES in (struct.unpack_from(o + "i", header)[0] for o in "<>"):
            raise DatasetError(f"{path}: NIfTI-2 files cannot be read; save it as NIfTI-1.")
        raise DatasetError(f"{path}: not a NIfTI image (its header does not begin with {NIFTI1_HEADER_BYTES}).")
    dimensions = struct.unpack_from(order + "8h", header, 40)
    rank, sizes = dimensions[0], dimensions[1 : 1 + max(0, dimensions[0])]
    offset = struct.unpack_from(order + "f", header, 108)[0]
    if not 1 <= rank <= 7 or any(n < 1 for n in sizes) or not 0 <= offset < NIFTI_OFFSET_LIMIT:
        raise DatasetError(f"{path}: the NIfTI header is damaged (dimensions {list(dimensions)}, offset {offset}).")
    kind, bits_per_voxel = struct.unpack_from(order + "2h", header, 70)
    voxels = math.prod(sizes)
    floats = NIFTI_FLOATS.get(kind)
    return _NiftiHeader(
        int(offset), voxels, voxels * bits_per_voxel // 8, None if floats is None else np.dtype(order + floats)
    )


def check_meta(path: Path) -> None:
    """Refuse a MetaImage (.mha, .mhd) whose voxels are not all there. Raises DatasetError."""
    fields, offset = _meta_header(path)
    try:
        data_file = fields["ElementDataFile"]
        sizes = [int(n) for n in fields["DimSize"].split()]
        type_bytes = META_TYPE_BYTES[fields["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")]
        expected = math.prod(sizes) * int(fields.get("ElementNumberOfChannels", "1")) * type_bytes
    except (KeyError, ValueError) as damaged:
        raise DatasetError(f"{path}: not a MetaImage, or its header is damaged ({damaged}).") from damaged
    if data_file == "LIST" or "%" in data_file:
        return  # one file a slice: ITK itself names the one that is missing
    data, offset = (path, offset) if data_file == "LOCAL" else (path.parent / data_file, 0)
    _check_data_file(path, data)
    if fields.get("CompressedData", "False").lower() == "true":
        _check_size(path, sum(map(len, _unpacked(data, offset, zlib.MAX_WBITS | 32))), expected)
    else:
        _check_size(path, data.stat().st_size - offset, expected)


def _meta_header(path: Path) -> tuple[dict[str, str], int]:
    fields, position = {}, 0
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(HEADER_LIMIT_BYTES), b""):
            position += len(line)
            key, equals, value = line.decode("latin-1").partition("=")
            if not equals or position > HEADER_LIMIT_BYTES:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
    return fields, position


def check_nrrd(path: Path) -> None:
    """Refuse an NRRD (.nrrd, .nhdr) whose voxels are not all there. Raises DatasetError."""
    fields, offset = _nrrd_header(path)
    try:
        expected = math.prod(int(n) for n in fields["sizes"].split()) * _nrrd_type_bytes(fields["type"])
        encoding = fields["encoding"].lower()
    except (KeyError, ValueError) as damaged:
        raise DatasetError(f"{path}: not an NRRD image, or its header is damaged ({damaged}).") from damaged
    data_file = fields.get("data file", fields.get("datafile"))
    if data_file is not None and (data_file.upper().startswith("LIST") or "%" in data_file):
        return
    data, offset = (path, offset) if data_file is None else (path.parent / data_file, 0)
    _check_data_file(path, data)
    if "byte skip" in fields or "line skip" in fields:
        return  # ITK checks the number of voxels itself; only the checksum is left out here
    if encoding in ("gzip", "gz"):
        _check_size(path, sum(map(len, _unpacked(data, offset, zlib.MAX_WBITS | 16))), expected)
    elif encoding == "raw":
        _check_size(path, data.stat().st_size - offset, expected)


def _nrrd_header(path: Path) -> tuple[dict[str, str], int]:
    fields, position = {}, 0
    with open(path, "rb") as file:
        if file.read(4) != b"NRRD":
            return {}, 0
        file.seek(0)
        for line in iter(lambda: file.readline(HEADER_LIMIT_BYTES), b""):
            position += len(line)
            text = line.decode("latin-1").strip()
            if not text or position > HEADER_LIMIT_BYTES:
                break
            found = re.match(r"([^:#][^:]*): (.*)", text)
            if found:
                fields[found[1].lower()] = found[2].strip()
    return fields, position


def _nrrd_type_bytes(name: str) -> int:
    for count, names in NRRD_TYPE_BYTES.items():
        if name.lower() in names.split("|"):
            return count
    raise ValueError(f"type {name}")


def check_bmp(path: Path) -> None:
    """Refuse a bitmap that is shorter than its header says. Raises DatasetError."""
    with open(path, "rb") as file:
        header = file.read(54)
    if len(header) < 54 or header[:2] != b"BM":
        raise DatasetError(f"{path}: not a BMP image, or cut off in its header.")
    offset = struct.unpack_from("<I", header, 10)[0]
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", header, 18)
    if compression in (0, 3):  # uncompressed; rows are padded to four bytes
        _check_size(path, path.stat().st_size - offset, (abs(width) * bits + 31) // 32 * 4 * abs(height))


def check_tiff(path: Path) -> None:
    """Refuse a TIFF (classic or BigTIFF) any of whose directories, values or strips lie beyond the end of the file.

    Raises DatasetError. Tag numbers and types are those of the TIFF 6.0 specification.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        version = struct.unpack_from(f"{order}H", start, 2)[0] if order and len(start) == 16 else 0
        if order is None or version not in (42, 43):
            raise DatasetError(f"{path}: not a TIFF image, or cut off in its header.")
        # where the first directory is; its entry count, one entry (tag, type, count, value), the value's width
        first, count, entry, width = (4, "I", "HHI4s", 4) if version == 42 else (8, "Q", "HHQ8s", 8)
        layout = _TiffLayout(order, "H" if width == 4 else "Q", count, struct.Struct(order + entry), width)
        directory, visited = struct.unpack_from(order + count, start, first)[0], set[int]()
        try:
            while directory and directory not in visited:
                visited.add(directory)
                directory, end = _tiff_directory(file, directory, layout)
                _check_size(path, size, end)
        except struct.error as cut_off:
            raise DatasetError(
                f"{path}: truncated: a directory of the TIFF is cut off; copy the file again."
            ) from cut_off


@dataclass(frozen=True)
class _TiffLayout:
    """How a TIFF's directories are packed; `struct` formats."""

    order: str
    count: str
    """Number of entries of a directory."""
    offset: str
    """Position in the file."""
    entry: struct.Struct
    """Tag, type, number of values, and the values themselves or where they are."""
    width: int
    """Bytes of the last field of an entry."""


def _tiff_directory(file: BinaryIO, start: int, layout: _TiffLayout) -> tuple[int, int]:
    """Where the next directory is (0: none), and where in the file the last byte that this one needs is."""
    file.seek(start)
    number = _unpack(file, layout.order + layout.count)[0]
    entries = [layout.entry.unpack(file.read(layout.entry.size)) for _ in range(number)]
    following = _unpack(file, layout.order + layout.offset)[0]
    end, values = file.tell(), {}
    for tag, kind, count, packed in entries:
        length = TIFF_TYPE_BYTES.get(kind, 0) * count
        if length > layout.width:
            position = struct.unpack(layout.order + layout.offset, packed)[0]
            end = max(end, position + length)
        if tag in TIFF_OFFSETS or tag in TIFF_OFFSETS.values():
            code = TIFF_INTEGERS.get(kind)
            if length > layout.width:
                file.seek(position)
                packed = file.read(length)
            values[tag] = struct.unpack_from(f"{layout.order}{count}{code}", packed) if code else ()
    for offsets, lengths in TIFF_OFFSETS.items():
        pieces = zip(values.get(offsets, ()), values.get(lengths, ()), strict=False)
        end = max([end, *(position + length for position, length in pieces)])
    return following, end


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def check_nothing(path: Path) -> None:
    """For formats whose reader finds missing and damaged bytes itself (PNG)."""


CHECKS: dict[str, Callable[[Path], None]] = {
    "NiftiImageIO": check_nifti,
    "MetaImageIO": check_meta,
    "NrrdImageIO": check_nrrd,
    "BMPImageIO": check_bmp,
    "PNGImageIO": check_nothing,
    "TIFFImageIO": check_tiff,
}


def _check_data_file(path: Path, data: Path) -> None:
    if not data.is_file():
        raise DatasetError(f"{path}: only a header; its data file {data} is missing.")


def _check_size(path: Path, found: int, expected: int) -> None:
    if found < expected:
        raise DatasetError(
            f"{path}: truncated or header only: {max(0, found)} bytes of voxels, expected {expected}; "
            "copy the file again."
        )


def _plain(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(PLAIN_CHUNK_BYTES), b"")


def _unpacked(path: Path, offset: int, window_bits: int) -> Iterator[bytes]:
    """The pieces of a compressed stream; several gzip members in a row are one stream. Checks every checksum."""
    with open(path, "rb") as file:
        file.seek(offset)
        stream = zlib.decompressobj(window_bits)
        try:
            for packed in iter(lambda: file.read(CHUNK_BYTES), b""):
                while packed:
                    if stream.eof:
                        if not packed.strip(b"\0"):
                            break  # padding is allowed between and after members
                        packed, stream = packed.lstrip(b"\0"), zlib.decompressobj(window_bits)
                    yield stream.decompress(packed)
                    packed = stream.unused_data
        except zlib.error as damaged:
            raise DatasetError(f"{path}: the compressed data is damaged ({damaged}); copy the file again.") from damaged
    if not stream.eof:
        raise DatasetError(f"{path}: truncated: the compressed data ends too early; copy the file again.")
