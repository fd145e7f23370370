"""Where photographs come from: folders, ZIP archives, tables, lists of files, DICOM folders."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from datasets.archive import FileStore
from datasets.dicom import DICOM_SUFFIXES, DicomPhotograph, find_dicom, list_photographs, load_dicom
from datasets.fov import UnusableFrame
from datasets.table import Table, read_table
from utils.decoding import decode_rgb
from utils.errors import UserError

Load = Callable[[int | None], UInt8[np.ndarray, 'H W 3']]


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """One picture of a source.

    load(at_least) decodes it, RGB (`utils.decoding.decode_rgb`; UserError when it is damaged).
    """

    source: str
    name: str
    load: Load
    label: object = None
    dicom: DicomPhotograph | None = None


@dataclasses.dataclass(frozen=True)
class _Stored:
    store: FileStore
    name: str

    def __call__(self, at_least: int | None) -> UInt8[np.ndarray, 'H W 3']:
        return self.store.pixels(self.name, at_least)


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path

    def __call__(self, at_least: int | None) -> UInt8[np.ndarray, 'H W 3']:
        return decode_rgb(self.path.read_bytes, str(self.path), at_least).pixels


@dataclasses.dataclass(frozen=True)
class _Dicom:
    path: Path

    def __call__(self, at_least: int | None) -> UInt8[np.ndarray, 'H W 3']:
        return np.array(load_dicom(self.path))


@dataclasses.dataclass(frozen=True)
class _Refused:
    reason: str

    def __call__(self, at_least: int | None) -> UInt8[np.ndarray, 'H W 3']:
        raise UnusableFrame(self.reason)


def list_source(
    path: str | Path,
    *,
    image_dir: str | None = None,
    split: str | None = None,
    burned_in: bool = False,
) -> list[SourceImage]:
    """The pictures of a folder, a ZIP or a CSV table, in sorted (table: given) order.

    Folder and ZIP take labels from a dataset.json inside; a CSV from its label column, its images
    from `image_dir`, or else from `images/` beside it, or its own folder. `split` keeps the CSV
    rows of that split. A folder of DICOM files gives its fundus photographs; loading one of the
    others raises UnusableFrame with the reason (burned_in: text in the picture is accepted).
    """
    path = Path(path)
    if path.suffix.lower() == '.csv':
        return list_table(read_table(path, image_dir, split=split), str(path))
    if split is not None:
        raise UserError(f'`split` {split}: {path} is no CSV table; splits are read from tables')
    store = FileStore(path)
    names = store.image_names()
    if dicom := find_dicom(path) if path.is_dir() else []:
        if names:
            raise UserError(
                f'{path} holds DICOM files and other pictures ({names[0]}); give them '
                'in two folders, as two `source`'
            )
        return _list_dicom(path, dicom, burned_in)
    if not names:
        raise UserError(f'no images in {path}')
    return list_stored(store, names)


def list_stored(store: FileStore, names: Sequence[str]) -> list[SourceImage]:
    """The named pictures of a folder or ZIP, with the labels of its dataset.json."""
    labels = store.labels() or {}
    return [SourceImage(str(store.path), n, _Stored(store, n), labels.get(n)) for n in names]


def list_table(table: Table, source: str = 'table') -> list[SourceImage]:
    """The pictures of a table, in its order, by file name."""
    labels = [None] * len(table) if table.labels is None else table.labels.tolist()
    return [
        SourceImage(source, file.name, _File(file), label)
        for file, label in zip(table.paths, labels)
    ]


def list_files(paths: Sequence[str | Path]) -> list[SourceImage]:
    """The pictures in the given files, in their order."""
    return [SourceImage(str(Path(p).parent), str(p), _File(Path(p))) for p in paths]


def _list_dicom(folder: Path, paths: list[Path], burned_in: bool) -> list[SourceImage]:
    found, refused = list_photographs(paths, burned_in=burned_in)
    reasons, photographs = dict(refused), {p.path: p for p in found}
    images = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in DICOM_SUFFIXES:  # the last part of a UID is no suffix
            name += DICOM_SUFFIXES[0]
        load = _Refused(reasons[path]) if path in reasons else _Dicom(path)
        images.append(SourceImage(str(folder), name, load, dicom=photographs.get(path)))
    return images
