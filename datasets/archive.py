"""Image archives in the layout StyleGAN2-ADA trains from: a ZIP or folder of equal squares.

Layout: image files in sorted order of their names (`00000/img00000000.png`, ...) and optionally a
`dataset.json` with `{"labels": [[name, label], ...]}` or `{"labels": null}`, where a label is a
class number or a list of floats (stylegan2-ada-pytorch, dataset_tool).
"""

import collections
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from utils.decoding import decode_rgb
from utils.errors import UserError, listing
from utils.images import IMAGE_SUFFIXES, decode_reason, open_image
from utils.io import atomic_path, digest_files, sha256_bytes
from utils.leftovers import SUFFIX, claimed, remove_leftovers

_MAX_FILE = 2**29  # bytes
_MAX_CLASSES = 10_000


class FileStore:
    """The files of a folder or a ZIP by relative name with '/'; picklable, safe across forks."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._pid: int | None = None
        self.is_zip = self.path.is_file()
        if self.is_zip:
            try:
                self.names = sorted(
                    i.filename for i in self._open_zip().infolist() if not i.is_dir()
                )
            except Exception as error:  # what zipfile raises for damage is not one kind
                raise UserError(
                    f'{self.path} is not a readable ZIP archive ({error}); give a ZIP '
                    'or a folder of pictures, as scripts/dataset_tool.py makes them'
                ) from error
        elif self.path.is_dir():
            self.names = sorted(
                p.relative_to(self.path).as_posix() for p in self.path.rglob('*') if p.is_file()
            )
        else:
            raise UserError(f'no such folder or ZIP archive: {self.path}')

    def _open_zip(self) -> zipfile.ZipFile:
        # A handle inherited through a fork shares its file offset with the parent. Threads share
        # one, whose reads take turns while their decoding goes on side by side.
        handle = self._zip
        if handle is None or self._pid != os.getpid():
            handle, self._pid = zipfile.ZipFile(self.path), os.getpid()
            self._zip = handle
        return handle

    def open(self, name: str) -> BinaryIO:
        """A binary file object for one name; ValueError when it is too large to be read."""
        size = (
            self._open_zip().getinfo(name).file_size
            if self.is_zip
            else (self.path / name).stat().st_size
        )
        if size > _MAX_FILE:  # a small ZIP can claim and unpack to any size
            raise ValueError(f'{size >> 20} MiB, more than the {_MAX_FILE >> 20} MiB that are read')
        if self.is_zip:
            return cast(BinaryIO, self._open_zip().open(name))
        return open(self.path / name, 'rb')

    def image_names(self) -> list[str]:
        """Names that end like an image file, sorted; resource forks of macOS archives left out."""
        return [
            n
            for n in self.names
            if n.lower().endswith(IMAGE_SUFFIXES)
            and not n.startswith('__MACOSX/')
            and not n.rsplit('/', 1)[-1].startswith('._')
        ]

    def pixels(self, name: str, at_least: int | None = None) -> UInt8[np.ndarray, 'H W 3']:
        """One file decoded; UserError when it cannot be.

        at_least: as in `utils.images.as_rgb`.
        """

        def read() -> bytes:
            with self.open(name) as file:
                return file.read()

        return decode_rgb(read, f'{self.path}: {name}', at_least).pixels

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of one image, from its header; UserError when it cannot be read."""
        with open_image(lambda: self.open(name), f'{self.path}: {name}') as image:
            return image.size

    def digest(self, names: Sequence[str]) -> str:
        """Hex digest of names and contents (in a ZIP: of its checksums): changes with the files."""
        if not self.is_zip:
            return digest_files(names, [self.path / name for name in names])
        members = map(self._open_zip().getinfo, names)
        rows = [f'{m.filename} {m.file_size} {m.CRC}' for m in members]
        return sha256_bytes('\n'.join(rows).encode())[:16]

    def labels(self) -> dict[str, object] | None:
        """{name: label} from dataset.json, or None when there is none; UserError for others."""
        if 'dataset.json' not in self.names:
            return None
        try:
            with self.open('dataset.json') as file:
                labels = json.load(file).get('labels')
            return None if labels is None else {str(n).replace('\\', '/'): v for n, v in labels}
        except Exception as error:  # damaged, encrypted, too deep, of another kind
            raise UserError(
                f'{self.path}: dataset.json must read {{"labels": [[name, label], '
                f'...]}} or {{"labels": null}} ({str(error)[:200]})'
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_zip': None, '_pid': None}


def encode_labels(labels: Sequence[object]) -> Float32[np.ndarray, 'n d']:
    """Class numbers -> one-hot float32 [n, max+1]; lists of floats -> float32 [n, d].

    UserError when they are neither, or are mixed, or beyond 10,000 classes.
    """
    if all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _MAX_CLASSES for v in labels
    ):
        classes = np.array(labels, dtype=np.int64)
        return np.eye(classes.max() + 1, dtype=np.float32)[classes]
    try:
        array = np.array(labels, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        array = None
    if array is None or array.ndim != 2 or not np.isfinite(array).all():
        raise UserError(
            f'labels must be all class numbers (0, 1, ..., below {_MAX_CLASSES}) or '
            'all lists of floats of one length'
        )
    return array


class ImageArchive(torch.utils.data.Dataset):
    """Random access to a StyleGAN2-ADA archive.

    `dataset[i]` is (uint8 [3, H, W], float32 label [label_dim]); greyscale files are repeated to
    three channels. Attributes: resolution, label_dim, names.

    labels: read dataset.json (UserError when it is absent or incomplete).
    mirror: doubles the set; item n + i is item i flipped left to right.
    subset: keep that many images, drawn with `seed` (UserError when there are fewer).
    cache: keep decoded images in memory (3*H*W bytes each); DataLoader workers have their own.
    The constructor reads every file's header and raises UserError naming all files that are
    damaged, not square, not a power of two wide, or of another size than the majority.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labels: bool = False,
        mirror: bool = False,
        subset: int | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        self.store = FileStore(path)
        self.names = self.store.image_names()
        if not self.names:
            raise UserError(f'{path} holds no images; make an archive with scripts/dataset_tool.py')
        self.resolution = self._check_headers()
        table = self._read_labels() if labels else np.zeros((len(self.names), 0), np.float32)
        if subset is not None and subset > len(self.names):
            raise UserError(f'`subset` {subset}: {path} holds {len(self.names)} images')
        if subset is not None:
            keep = np.sort(np.random.default_rng(seed).permutation(len(self.names))[:subset])
            self.names, table = [self.names[i] for i in keep], table[keep]
        self._labels = torch.from_numpy(table)
        self.label_dim = table.shape[1]
        self.mirror = mirror
        self._cache: dict[int, Tensor] | None = {} if cache else None
        self._digest: str | None = None

    def _check_headers(self) -> int:
        sizes: dict[str, tuple[int, int]] = {}
        bad: dict[str, str] = {}
        for name in self.names:
            try:
                sizes[name] = self.store.size(name)
            except UserError as error:
                bad[name] = f'unreadable ({decode_reason(error.__cause__ or error)})'
        common = collections.Counter(sizes.values()).most_common(1)[0][0] if sizes else (0, 0)
        for name, (w, h) in sizes.items():
            if w != h:
                bad[name] = f'{w}x{h}, not square'
            elif w < 4 or w & (w - 1):
                bad[name] = f'{w}x{h}, not a power of two'
            elif (w, h) != common:
                bad[name] = f'{w}x{h}, the others are {common[0]}x{common[1]}'
        if bad:
            raise UserError(
                listing(
                    f'{self.store.path}: {len(bad)} of {len(self.names)} images cannot be used; '
                    'prepare them with scripts/dataset_tool.py --width N --height N',
                    [f'{name}: {bad[name]}' for name in sorted(bad)],
                )
            )
        return common[0]

    def _read_labels(self) -> Float32[np.ndarray, 'n d']:
        labels = self.store.labels()
        if labels is None:
            raise UserError(
                f'{self.store.path} has no labels (dataset.json); make it from a '
                'labelled source with scripts/dataset_tool.py, or train without `cond`'
            )
        missing = [n for n in self.names if n not in labels]
        if missing:
            raise UserError(
                f'{self.store.path}: dataset.json has no label for {len(missing)} '
                f'images, e.g. {missing[0]}'
            )
        try:
            return encode_labels([labels[n] for n in self.names])
        except UserError as error:
            raise UserError(f'{self.store.path}: {error}') from error

    def __len__(self) -> int:
        return len(self.names) * (2 if self.mirror else 1)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, '3 H W'], Float32[Tensor, ' d']]:
        """(uint8 [3, H, W], float32 [label_dim]) of item i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        flip, i = divmod(i, len(self.names))
        img = self._decode(i)
        return img.flip(2) if flip else img, self._labels[i]

    def digest(self) -> str:
        """Hex digest that changes with the pictures' files; read once, at the first call."""
        if self._digest is None:
            self._digest = self.store.digest(self.names)
        return self._digest

    def images(self, indices: Iterable[int]) -> UInt8[Tensor, 'n 3 H W']:
        """uint8 [n, 3, H, W] of several items."""
        return torch.stack([self[int(i)][0] for i in indices])

    def _decode(self, i: int) -> UInt8[Tensor, '3 H W']:
        if self._cache is not None and i in self._cache:
            return self._cache[i]
        pixels = self.store.pixels(self.names[i])
        img = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        if self._cache is not None:
            self._cache[i] = img
        return img


class ArchiveWriter:
    """Writes an archive: `with ArchiveWriter(dest) as w: name = w.add(image, label)`.

    `dest` ending in .zip becomes a ZIP (stored, not compressed), anything else a folder. Nothing
    is visible under the final name before the block ends without an error; UserError when `dest`
    exists (an empty folder excepted). The labels become null as soon as one image has none. What a
    killed process left of the same `dest` is removed: it holds photographs.
    """

    def __init__(self, dest: str | Path) -> None:
        self.dest = Path(dest)
        self.is_zip = self.dest.suffix.lower() == '.zip'
        if self.dest.exists() and (
            self.is_zip or not self.dest.is_dir() or any(self.dest.iterdir())
        ):
            raise UserError(f'`dest` {self.dest} already exists; remove it or choose another name')
        self._labels: list[list[object]] = []

    def __enter__(self) -> 'ArchiveWriter':
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.dest.parent, self.dest.stem)
        if self.is_zip:
            self._atomic = atomic_path(self.dest)
            self._zip = zipfile.ZipFile(self._atomic.__enter__(), 'w', zipfile.ZIP_STORED)
        else:
            self._claim = claimed(
                lambda: tempfile.mkdtemp(
                    dir=self.dest.parent, prefix=f'.{self.dest.name}.', suffix=SUFFIX
                )
            )
            self._folder = self._claim.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        failed = error[0] is not None
        if not failed:
            complete = self._labels and all(v is not None for _, v in self._labels)
            meta = {'labels': self._labels if complete else None}
            self._write('dataset.json', json.dumps(meta).encode())
        if self.is_zip:
            self._zip.close()
            self._atomic.__exit__(*error)
            return
        if failed:
            shutil.rmtree(self._folder)
        else:
            self._folder.chmod(0o755)  # mkdtemp made it private
            if self.dest.exists():
                self.dest.rmdir()
            os.replace(self._folder, self.dest)
        self._claim.__exit__(None, None, None)

    def _write(self, name: str, data: bytes) -> None:
        if self.is_zip:
            # A fixed time stamp: the same images give the same bytes.
            self._zip.writestr(zipfile.ZipInfo(name), data)
        else:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def add(self, image: Image.Image, label: object = None, *, name: str | None = None) -> str:
        """Appends a PIL picture (uncompressed PNG) and returns its name in the archive.

        name: in place of the next number.
        """
        number = f'{len(self._labels):08d}'
        name = name or f'{number[:5]}/img{number}.png'
        buffer = io.BytesIO()
        Image.fromarray(np.array(image)).save(buffer, format='PNG', compress_level=0)
        self._write(name, buffer.getvalue())
        self._labels.append([name, label])
        return name
