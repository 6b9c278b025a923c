"""Finished folds of a workspace <-> a portable model, `model/` or `model.zip`: weights, plan, checksums, provenance.

    model.json                                          what it is, where it comes from, SHA-256 of every other file
    dataset.json                                        channels and labels, as nnU-Net v2 writes them
    selection.json                                      how several configurations are joined, where that was chosen
    models/CONFIGURATION/fold_K/checkpoint.safetensors  weights, each with the plan in its header

There is no code in it, and opening one runs none. Of a zip only the files that model.json lists are taken out, and
only where their names stay inside the folder and their content is what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from autoseg import __version__
from autoseg.checkpoint import Checkpoint
from autoseg.errors import CheckpointError, StorageError
from autoseg.files import atomic_folder, atomic_path, read_json
from autoseg.plan import Plan
from autoseg.typed_json import to_json
from autoseg.workspace import CHECKPOINT, MODELS, SELECTION, SUMMARY, VALIDATION, Workspace

MANIFEST = "model.json"
DATASET = "dataset.json"
MODEL_FORMAT = "autoseg model 1"
NO_LICENCE = "not stated"
ZIP_ENDING = ".zip"
UNDATED = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip: the same model gives the same bytes
BLOCK_BYTES = 2**20
MANIFEST_BYTES = 2**24  # a longer manifest is none
# what reading a damaged zip raises, however it is compressed
UNSOUND = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    NotImplementedError,
    RuntimeError,
)
MOST_UNPACKED = 50  # times the size of a zip: weights hardly shrink, so more than that is a bomb


def export_model(
    workspace: Workspace,
    configuration: str | Sequence[str],
    output: Path,
    *,
    folds: Sequence[str] = (),
    licence: str = NO_LICENCE,
    selection: Path | None = None,
    replace: bool = False,
) -> Path:
    """Write the finished folds of configurations (default: all), with their previous stages, to a folder or a .zip.

    Several configurations are an ensemble; `selection` (selection.json) says how they are joined. `licence` says under
    which terms the weights may be used. What is there is overwritten only with `replace`. Returns `output`. Raises
    CheckpointError where no fold is finished or the folds are of different plans, StorageError where `output` is in use
    or cannot be written.
    """
    output = Path(output)
    if not replace:
        require_unused(output)
    if output.suffix and output.suffix.lower() != ZIP_ENDING and output.suffix[1:].isalpha():
        raise StorageError(f"{output}: a model is exported to a .zip or to a folder, whose name has no ending.")
    names = [configuration] if isinstance(configuration, str) else list(configuration)
    found = {path: checkpoint for name in names for path, checkpoint in finished_members(workspace, name, folds)}
    members = list(found.items())
    plan = members[0][1].plan
    files: dict[str, Path | bytes] = {DATASET: _json(_dataset(plan))}
    if selection is not None:
        files[SELECTION] = selection
    for path, checkpoint in members:
        files[f"{MODELS}/{checkpoint.configuration}/fold_{checkpoint.fold}/{CHECKPOINT}"] = path
    manifest = {
        "format": MODEL_FORMAT,
        "dataset": plan.dataset,
        "configurations": names,
        "licence": licence,
        "provenance": {
            "autoseg": __version__,
            "plan": plan.id,
            "fingerprint": plan.fingerprint,
            "members": [_provenance(path, checkpoint) for path, checkpoint in members],
        },
        "files": {name: {"sha256": _sha256(content), "bytes": _size(content)} for name, content in files.items()},
    }
    write = _write_zip if output.suffix.lower() == ZIP_ENDING else _write_folder
    write(output, {MANIFEST: _json(manifest), **files})
    return output


def require_unused(output: Path) -> None:
    """Raises StorageError where something is there already; an empty folder may be."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise StorageError(f"{output}: is there already; delete it, or give another name.")


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder of an exported model, each of its files checked; of a zip, a temporary one that vanishes afterwards.

    Raises CheckpointError where a file is missing, has changed, or has a name that leads out of the folder.
    """
    path = Path(path)
    if path.is_dir():
        for name, expected in _listed(_manifest_of(path), where=path).items():
            _check(path / name, path / name, expected)
        yield path
        return
    try:
        with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary:
            folder = Path(temporary)
            _extract(path, folder)
            try:
                yield folder
            except CheckpointError as error:  # nobody knows the temporary folder
                raise CheckpointError(str(error).replace(str(folder), str(path))) from error
    except OSError as error:
        raise CheckpointError(f"{path}: the model cannot be unpacked ({error.strerror or error}).") from error


def licence_of(folder: Path) -> str | None:
    """The terms of the exported model in a folder; None where there is none, or it cannot be read."""
    with contextlib.suppress(CheckpointError):
        manifest = _manifest_of(folder)
        licence = manifest.get("licence") if isinstance(manifest, dict) else None
        return licence if isinstance(licence, str) else None
    return None


def is_packed(path: Path) -> bool:
    """Whether `path` is an exported model: a folder with a manifest, or a zip."""
    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix.lower() == ZIP_ENDING)


# ---- writing


def finished_members(workspace: Workspace, configuration: str, folds: Sequence[str]) -> list[tuple[Path, Checkpoint]]:
    """The checkpoints to export, with those of the previous stage; all of one plan."""
    folder = workspace.fold(configuration, "0").parent
    wanted = [folder / f"fold_{fold}" / CHECKPOINT for fold in folds] or sorted(folder.glob(f"fold_*/{CHECKPOINT}"))
    members = [(path, Checkpoint.load(path)) for path in wanted]
    if not folds:
        members = [(path, checkpoint) for path, checkpoint in members if checkpoint.summary.get("finished", True)]
    if not members:
        raise CheckpointError(
            f"{folder}: no fold is finished; run `autoseg train-fold DATASET {configuration} 0` first."
        )
    previous = members[0][1].settings.previous_stage
    if previous is not None:
        members += finished_members(workspace, previous, ())
    plans = {checkpoint.plan.id for _, checkpoint in members}
    if len(plans) > 1:
        raise CheckpointError(
            f"{folder}: its folds were trained with {len(plans)} different plans; train the older anew."
        )
    return members


def _provenance(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """How a fold came about: its training and its held-out score, where it has one."""
    entry: dict[str, Any] = {"configuration": checkpoint.configuration, "fold": checkpoint.fold, **checkpoint.summary}
    summary = path.parent / VALIDATION / SUMMARY
    if summary.is_file():
        content = read_json(summary, error=CheckpointError, what="summary of scores", remedy="validate the fold anew")
        try:
            entry["held_out_dice"] = {name: row["dice"]["mean"] for name, row in content["by_class"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{summary}: this is not a summary of scores; validate the fold anew.") from error
    return entry


def _dataset(plan: Plan) -> dict[str, Any]:
    """The description of the data that the model takes, in the form of a raw dataset's."""
    channels = {str(number): name for number, name in enumerate(plan.channels)}
    described: dict[str, Any] = {"name": plan.dataset, "channel_names": channels}
    if plan.reference_channels:
        described["channel_grids"] = {str(number): "own" for number in plan.reference_channels}
    return {**described, **plan.labels.to_json(), "file_ending": plan.file_ending}


def _write_zip(output: Path, files: Mapping[str, Path | bytes]) -> None:
    with atomic_path(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():  # weights do not compress
            with _opened(content) as source, archive.open(zipfile.ZipInfo(name, UNDATED), "w", force_zip64=True) as to:
                shutil.copyfileobj(source, to, BLOCK_BYTES)


def _write_folder(output: Path, files: Mapping[str, Path | bytes]) -> None:
    with atomic_folder(output) as folder:  # what is there is empty, or to be replaced
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _opened(content) as source, open(target, "wb") as to:
                shutil.copyfileobj(source, to, BLOCK_BYTES)


def _json(content: Any) -> bytes:
    return (json.dumps(to_json(content), indent=1, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def _opened(content: Path | bytes) -> Iterator[IO[bytes]]:
    if isinstance(content, bytes):
        yield io.BytesIO(content)
        return
    with open(content, "rb") as file:
        yield file


def _sha256(content: Path | bytes) -> str:
    digest = hashlib.sha256()
    with _opened(content) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# ---- reading


def _manifest_of(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error}); get the model again.") from error


def _listed(manifest: Any, *, where: Path) -> dict[str, tuple[str, int]]:
    """Name -> (SHA-256, bytes) of the files of a manifest. Raises CheckpointError where one leads out of the folder."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MODEL_FORMAT:
        raise CheckpointError(f"{where}: expected '{MODEL_FORMAT}', found '{found}'; use the autoseg that wrote it.")
    listed: dict[str, tuple[str, int]] = {}
    try:
        for name, entry in manifest["files"].items():
            listed[name] = (str(entry["sha256"]), int(entry["bytes"]))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: {MANIFEST} has no list of files with checksums; get the model again."
        ) from error
    if not any(name.startswith(f"{MODELS}/") for name in listed):
        raise CheckpointError(f"{where}: {MANIFEST} lists no weights; get the model again.")
    for name in listed:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise CheckpointError(f"{where}: the file name '{name}' leads out of the model's folder; do not trust it.")
    return listed


def _check(path: Path, shown: Path | str, expected: tuple[str, int]) -> None:
    digest, size = expected
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{shown}: the file is missing from the model; get the model again.")
    if path.stat().st_size != size or _sha256(path) != digest:
        raise CheckpointError(f"{shown}: its content is not what was exported (SHA-256); get the model again.")


def _extract(path: Path, folder: Path) -> None:
    """Take the listed files out of a zip into `folder`, each checked before it counts."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            outside = [name for name in entries if ".." in PurePosixPath(name).parts or name.startswith(("/", "\\"))]
            if outside:
                raise CheckpointError(
                    f"{path}: the file name '{outside[0]}' leads out of the model's folder; do not trust it."
                )
            if MANIFEST not in entries or entries[MANIFEST].file_size > MANIFEST_BYTES:
                raise CheckpointError(f"{path}: this zip holds no {MANIFEST}; it is no model of autoseg.")
            listed = _listed(json.loads(archive.read(MANIFEST)), where=path)
            unpacked_bytes = sum(size for _, size in listed.values())
            if unpacked_bytes > MOST_UNPACKED * path.stat().st_size:
                raise CheckpointError(
                    f"{path}: {path.stat().st_size} bytes would unpack to {unpacked_bytes}, as no model does; "
                    "do not trust it."
                )
            for name, expected in listed.items():
                entry = entries.get(name)
                if entry is None or stat.S_ISLNK(entry.external_attr >> 16) or entry.file_size != expected[1]:
                    raise CheckpointError(f"{path}: {name} is missing or has another size; get the model again.")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, open(target, "wb") as to:
                    shutil.copyfileobj(source, to, BLOCK_BYTES)
                _check(target, f"{path}: {name}", expected)
    except UNSOUND as error:
        raise CheckpointError(f"{path}: this is not a sound zip file ({error}); get the model again.") from error
