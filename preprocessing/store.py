"""Preprocessed cases on disk, read by patch: `StoreEntry` <-> `CASE.image.b2nd`, `CASE.label.b2nd`, ..., `CASE.json`.

Arrays are compressed in small blocks grouped into chunks; reading a box decompresses only the blocks that it touches.
The JSON is written last: a case counts as done when its JSON is there. It holds a checksum of every chunk, compared
when a process first touches the chunk, so that damage is found without reading whole files.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import AutosegError, StorageError
from autoseg.files import PARTIAL, atomic_path, read_json, storage_error, write_text
from autoseg.preprocessing.case import CaseGeometry
from autoseg.typed_json import from_json, to_json

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]
Box = tuple[slice, slice, slice]

STORE_VERSION = 1
ANNOTATED = "annotated"  # foreground key of the voxels that are not to be ignored
REFERENCE = "reference"  # name of the array of the channels that lie on a grid of their own, over the image's extent
FOREGROUND = "foreground"  # name of the array that holds the coordinates
BLOCK = (4, 64, 64)  # voxels (z, y, x) decompressed together: thin along z, so that one slice is cheap to read
CHUNK = (32, 128, 128)  # voxels (z, y, x) stored and checked together
COMPRESSION_LEVEL = 1  # zstd; level 3 takes 3.5 times as long and saves 1 % (float32 intensities are mostly noise)
OPEN_ARRAYS = 128  # files that a process keeps open, because opening and reading a patch take equally long
KNOWN_ENTRIES = 8192  # records, and lists of checked chunks, that a process remembers


@dataclass(frozen=True)
class StoredArray:
    """One array file, and what is needed to tell whether it is the one that was written."""

    file: str
    """File name in the store's folder."""
    shape: tuple[int, ...]
    """Of the array."""
    dtype: str
    """Of the array, as numpy names it."""
    size_bytes: int
    """Of the file."""
    frame_checksum: int
    """CRC-32 of what stands around the chunks in the file: header, index and trailer."""
    chunk_bytes: int
    """Of all compressed chunks together, which is what the checksum of the frame leaves out."""
    chunk_checksums: tuple[int, ...]
    """CRC-32 of each compressed chunk."""


@dataclass(frozen=True)
class StoreEntry:
    """One preprocessed case; its arrays are read by box."""

    case: str
    """The case's identifier."""
    geometry: CaseGeometry
    """How to come back to the file's grid."""
    arrays: dict[str, StoredArray]
    """By name: `image`, `label`, `foreground`; `reference` where channels lie on a grid of their own."""
    ranges: dict[str, tuple[int, int]]
    """For each class or region: first row and the row after its last in the foreground array."""
    source: str
    """What the entry was made from; an entry with another source is out of date."""
    version: int
    """Of the store's layout."""
    label_geometry: CaseGeometry | None = None
    """How the label comes back to its file's grid, where that or its network grid is not the image's."""
    folder: Path = Path()
    """Where the files are; not stored."""

    @property
    def shape(self) -> Shape:
        """Voxels (z, y, x) of the image."""
        _, z, y, x = self.arrays["image"].shape
        return (z, y, x)

    @property
    def label_shape(self) -> Shape:
        """Voxels (z, y, x) of the label: the image's, or more where the label is on a finer grid."""
        _, z, y, x = self.arrays["label"].shape
        return (z, y, x)

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return self.arrays["image"].shape[0]

    @property
    def present(self) -> tuple[str, ...]:
        """Classes and regions with at least one voxel in this case."""
        return tuple(name for name, (start, stop) in self.ranges.items() if stop > start and name != ANNOTATED)

    def foreground(self, name: str) -> NDArray[np.int32]:
        """Voxels (N, 3) int32 (z, y, x) of a class or region, or of "annotated": all, or a fixed random sample.

        They are counted on the label's grid.
        """
        start, stop = self.ranges.get(name, (0, 0))
        if start == stop:
            return np.empty((0, 3), dtype=np.int32)
        return np.asarray(self._slice(FOREGROUND, (slice(start, stop), slice(0, 3))), dtype=np.int32)

    def read(self, name: str, box: Box | None = None) -> NDArray[Any]:
        """The array `name` (C, Z, Y, X), or the part inside `box` (z, y, x), which must lie in the array.

        Reads and decompresses only what the box touches. Raises StorageError where a file is missing or damaged.
        """
        shape = self.arrays[name].shape[1:]
        sides = [side.indices(size)[:2] for side, size in zip(box or (slice(None),) * 3, shape, strict=True)]
        return self._slice(name, (slice(0, self.arrays[name].shape[0]), *(slice(*side) for side in sides)))

    def is_whole(self) -> bool:
        """Whether every file is there and has the size that was written; contents are checked when they are read."""
        return not self.broken_files()

    def broken_files(self) -> tuple[str, ...]:
        """The names of the files that are missing or have another size than was written."""
        return tuple(a.file for a in self.arrays.values() if _size(self.folder / a.file) != a.size_bytes)

    def _slice(self, name: str, box: tuple[slice, ...]) -> NDArray[Any]:
        stored = self.arrays[name]
        path = self.folder / stored.file
        try:
            status = os.stat(path)
            if status.st_size != stored.size_bytes:
                raise ValueError(f"it has {status.st_size} bytes, {stored.size_bytes} were written")
            array = _open(path, stored.chunk_bytes, stored.frame_checksum, status.st_mtime_ns)
            _check_chunks(array, box, stored, _checked(path, status.st_mtime_ns))
            result: NDArray[Any] = array[box]
            return result
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise _damaged(self.case, path, error) from error


@dataclass(frozen=True)
class Store:
    """A folder of preprocessed cases. Opening it costs nothing."""

    folder: Path

    def cases(self) -> tuple[str, ...]:
        """The finished cases, sorted."""
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(path.stem for path in self.folder.glob("*.json") if PARTIAL not in path.name))

    def has(self, case: str) -> bool:
        """Whether the case is finished."""
        return self._record(case).is_file()

    def entry(self, case: str) -> StoreEntry:
        """The finished case. Raises StorageError where it is not there, damaged or of another version."""
        path = self._record(case)
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError as missing:
            raise StorageError(
                f"Case {case} is not in the store {self.folder}; run `autoseg plan-and-preprocess` to add it."
            ) from missing
        except OSError as unreadable:
            raise _damaged(case, path, unreadable) from unreadable
        return _read_entry(path, case, changed)

    def require_whole(self, cases: Iterable[str]) -> None:
        """Refuse a store in which files of these cases are missing or cut off. Raises StorageError naming them all."""
        broken = {case: files for case in sorted(cases) if (files := self.entry(case).broken_files())}
        if broken:
            named = "; ".join(f"case {case}: {', '.join(files)}" for case, files in broken.items())
            raise StorageError(
                f"{self.folder}: files of {len(broken)} cases are missing or have another size than was written "
                f"({named}); run `autoseg plan-and-preprocess` again to make them anew."
            )

    def write(
        self,
        case: str,
        arrays: Mapping[str, NDArray[Any]],
        geometry: CaseGeometry,
        foreground: Mapping[str, NDArray[Any]],
        *,
        source: str = "",
        label_geometry: CaseGeometry | None = None,
    ) -> StoreEntry:
        """Write a case: `arrays` (C, Z, Y, X) by name, `foreground` coordinates (N, 3) by class or region.

        `label_geometry` is kept where it is not the image's `geometry`. `source` says what the case was made from, for
        whoever asks later whether it is up to date. Atomic: until everything is on disk the case does not count as
        done. Raises StorageError.
        """
        self.remove(case)
        stored = {name: self._write_array(case, name, array) for name, array in arrays.items()}
        ranges, start = {}, 0
        for name, coordinates in foreground.items():
            ranges[name] = (start, start + len(coordinates))
            start += len(coordinates)
        if start:
            coordinates = np.concatenate([np.asarray(rows, dtype=np.int32) for rows in foreground.values()])
            stored[FOREGROUND] = self._write_array(case, FOREGROUND, coordinates)
        own = None if label_geometry == geometry else label_geometry
        entry = StoreEntry(case, geometry, stored, ranges, source, STORE_VERSION, own, self.folder)
        self._write_record(entry)
        return entry

    def link(self, entry: StoreEntry) -> None:
        """Take over a case of another store, where its arrays would be the same: the files are shared (hard links)."""
        self.remove(entry.case)
        for name in [*(stored.file for stored in entry.arrays.values()), self._record(entry.case).name]:
            with atomic_path(self.folder / name, durable=False) as temporary:
                try:
                    os.link(entry.folder / name, temporary)
                except OSError:  # not every file system has hard links
                    shutil.copyfile(entry.folder / name, temporary)

    def files(self, case: str) -> list[Path]:
        """Every file that a case may have, the JSON first."""
        arrays = [self.folder / f"{case}.{name}.b2nd" for name in ("image", "label", REFERENCE, FOREGROUND)]
        return [self._record(case), *arrays]

    def remove(self, case: str) -> None:
        """Remove a case and whatever is left of it; the JSON first, so that it stops counting as done at once."""
        for path in self.files(case):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{path}: cannot be removed ({error.strerror}); check the permissions.") from error

    def remove_partial_files(self) -> None:
        """Remove what writers that were killed left behind. Not while another process writes."""
        for path in self.folder.glob(f".*{PARTIAL}.*"):
            log.info("removing %s, left by an interrupted run", path)
            path.unlink(missing_ok=True)

    def _record(self, case: str) -> Path:
        return self.folder / f"{case}.json"

    def _write_record(self, entry: StoreEntry) -> None:
        content = to_json(entry)
        del content["folder"]
        content["checksum"] = _text_checksum(content)
        # in one line: indented JSON takes five times as long to write, as long as a small image
        write_text(self._record(entry.case), json.dumps(content), durable=False)

    def _write_array(self, case: str, name: str, array: NDArray[Any]) -> StoredArray:
        import blosc2

        path = self.folder / f"{case}.{name}.b2nd"
        chunks, blocks = _partition(array)
        settings = {"codec": blosc2.Codec.ZSTD, "clevel": COMPRESSION_LEVEL, "nthreads": 1}
        with atomic_path(path, durable=False) as temporary:  # sizes and checksums tell a file that a power failure cut
            try:
                written = blosc2.asarray(
                    np.ascontiguousarray(array),
                    urlpath=str(temporary),
                    mode="w",
                    chunks=chunks,
                    blocks=blocks,
                    cparams=settings,
                    dparams={"nthreads": 1},
                )
                return _describe(written, temporary, path.name)
            except RuntimeError as error:
                raise _write_error(path, array.nbytes, error) from error


def _size(path: Path) -> int:
    """Bytes of a file; -1 where it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _partition(array: NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and block shape: whole channels are kept apart, because decompressing is per block."""
    if array.ndim == 2:
        chunk = block = (min(len(array), 16384), array.shape[1])
        return chunk, block
    spatial = array.shape[1:]
    chunk = tuple(min(size, side) for size, side in zip(spatial, CHUNK, strict=True))
    block = tuple(min(size, side) for size, side in zip(chunk, BLOCK, strict=True))
    return (array.shape[0], *chunk), (1, *block)


def _describe(array: Any, path: Path, name: str) -> StoredArray:
    """The record of the blosc2 array that was written to `path` and will be called `name`."""
    chunks = array.schunk
    return StoredArray(
        file=name,
        shape=tuple(int(size) for size in array.shape),
        dtype=array.dtype.name,
        size_bytes=path.stat().st_size,
        frame_checksum=_frame_checksum(path, chunks.cbytes),
        chunk_bytes=int(chunks.cbytes),
        chunk_checksums=tuple(zlib.crc32(chunks.get_chunk(index)) for index in range(chunks.nchunks)),
    )


def _frame_checksum(path: Path, chunk_bytes: int) -> int:
    """CRC-32 of a file without its chunks (blosc2's frame format: header, chunks, index, trailer)."""
    with open(path, "rb") as file:
        beginning = file.read(15)
        header_bytes = int.from_bytes(beginning[11:15], "big")
        checksum = zlib.crc32(file.read(max(header_bytes - 15, 0)), zlib.crc32(beginning))
        file.seek(chunk_bytes, os.SEEK_CUR)
        return zlib.crc32(file.read(), checksum)


@functools.lru_cache(maxsize=OPEN_ARRAYS)
def _open(path: Path, chunk_bytes: int, frame_checksum: int, changed: int) -> Any:
    """The array, opened lazily. `changed` tells a rewritten file from the one that was opened before."""
    import blosc2

    # before blosc2 sees it: a damaged header can make it ask for any amount of memory
    if _frame_checksum(path, chunk_bytes) != frame_checksum:
        raise ValueError("its header or index has changed since it was written")
    return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})


@functools.lru_cache(maxsize=KNOWN_ENTRIES)
def _checked(path: Path, changed: int) -> set[int]:
    """The chunks of a file that this process has checked; filled by `_check_chunks`."""
    return set()


def _check_chunks(array: Any, box: tuple[slice, ...], stored: StoredArray, checked: set[int]) -> None:
    """Compare the chunks that `box` touches with their checksums, once a process."""
    if len(checked) == len(stored.chunk_checksums):
        return
    counts = [-(-size // side) for size, side in zip(array.shape, array.chunks, strict=True)]
    touched = [range(s.start // side, -(-s.stop // side)) for s, side in zip(box, array.chunks, strict=True)]
    grid = np.ravel_multi_index(np.meshgrid(*touched, indexing="ij"), counts)
    for index in set(grid.ravel().tolist()) - checked:
        if zlib.crc32(array.schunk.get_chunk(index)) != stored.chunk_checksums[index]:
            raise ValueError(f"chunk {index} has changed since it was written")
        checked.add(index)


@functools.lru_cache(maxsize=KNOWN_ENTRIES)
def _read_entry(path: Path, case: str, changed: int) -> StoreEntry:
    content = read_json(
        path,
        error=lambda sentence: StorageError(f"Case {case}: {sentence}"),
        what="record of a preprocessed case",
        remedy="delete it and run `autoseg plan-and-preprocess` again",
    )
    if not isinstance(content, dict) or content.get("version") != STORE_VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise StorageError(
            f"Case {case}: {path} has store version {found}, this autoseg reads version {STORE_VERSION}; "
            "run `autoseg plan-and-preprocess` again."
        )
    checksum = content.pop("checksum", None)
    if checksum != _text_checksum(content):
        raise _damaged(case, path, ValueError("its checksum does not fit its content"))
    try:
        return replace(from_json(StoreEntry, content, where="its content"), folder=path.parent)
    except AutosegError as error:
        raise _damaged(case, path, error) from error


def _text_checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _write_error(path: Path, size_bytes: int, error: RuntimeError) -> StorageError:
    """blosc2 does not say why it could not write: a disk without room for the array is taken as the reason."""
    if shutil.disk_usage(path.parent).free < size_bytes:
        return storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return StorageError(f"{path}: cannot be written ({error}).")


def _damaged(case: str, path: Path, why: Exception) -> StorageError:
    reason = why.strerror if isinstance(why, OSError) and why.strerror else str(why).rstrip(".")
    return StorageError(
        f"Case {case}: the preprocessed file {path} is damaged or cannot be read ({reason}); "
        "delete it and run `autoseg plan-and-preprocess` again."
    )
