"""Fundus photographs out of DICOM files: pixels, and the few tags that a label table needs.

Read are single-frame Ophthalmic Photography (8 and 16 bit) and Secondary Capture objects. From the
header only patient, laterality and study date are used, to fill `patient_id`, `eye` and a visit
number; nothing of it goes anywhere else. Needs pydicom (PyPI), and for compressed pixels gdcm.
Source: DICOM PS3.3 C.7.6.3 (Image Pixel), C.8.17.1 (Ophthalmic Photography).
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Num
from PIL import Image

from datasets.dicom_decode import decode_pixels
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES
from utils.logs import progress

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = ('.dcm', '.dicom')
INSTALL = 'pip install pydicom python-gdcm'
_FUNDUS_CLASSES = {
    '1.2.840.10008.5.1.4.1.1.77.1.5.1': 'Ophthalmic Photography 8 Bit',
    '1.2.840.10008.5.1.4.1.1.77.1.5.2': 'Ophthalmic Photography 16 Bit',
    '1.2.840.10008.5.1.4.1.1.7': 'Secondary Capture',
    '1.2.840.10008.5.1.4.1.1.7.4': 'Multi-frame True Color Secondary Capture',
}
_EYES = {'L': 'left', 'R': 'right'}
_TAGS = [
    'SOPClassUID',
    'Modality',
    'PatientID',
    'ImageLaterality',
    'Laterality',
    'StudyDate',
    'AcquisitionDateTime',
    'BurnedInAnnotation',
    'NumberOfFrames',
    'Rows',
    'Columns',
]


@dataclasses.dataclass(frozen=True)
class DicomPhotograph:
    """What the table needs of one file. eye: 'left', 'right' or ''; date: YYYYMMDD or ''."""

    path: Path
    patient: str
    eye: str
    date: str
    burned_in: bool


def find_dicom(folder: Path) -> list[Path]:
    """Files below `folder` that are DICOM by suffix or by their magic word, sorted."""
    return sorted(
        p
        for p in folder.rglob('*')
        if p.is_file()
        and (
            p.suffix.lower() in DICOM_SUFFIXES
            or p.suffix.lower() not in IMAGE_SUFFIXES
            and _has_magic(p)
        )
    )


def _has_magic(path: Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'


def list_photographs(
    paths: Iterable[Path], *, burned_in: bool = False
) -> tuple[list[DicomPhotograph], list[tuple[Path, str]]]:
    """Reads the headers of `paths`: the fundus photographs, and (path, reason) of the others.

    burned_in: whether files whose header says that text is burned into the picture are accepted.
    Raises UserError when pydicom is not installed.
    """
    _pydicom()
    found, refused = [], []
    paths = list(paths)
    for path in progress(paths, total=len(paths), desc='headers', unit='file'):
        try:
            header = _read(path, stop_before_pixels=True, specific_tags=_TAGS)
            photograph = _photograph(path, header, burned_in)
        except UserError as error:
            refused.append((path, str(error)))
        except Exception as error:  # a damaged header makes the reader fail in any way
            refused.append((path, f'not a readable DICOM file ({_line(error)})'))
        else:
            found.append(photograph)
    return found, refused


def _photograph(path: Path, header: 'Dataset', burned_in: bool) -> DicomPhotograph:
    kind = str(header.get('SOPClassUID', ''))
    if kind not in _FUNDUS_CLASSES:
        from pydicom.uid import UID

        raise UserError(f'not a fundus photograph but {UID(kind).name or "of no stated class"}')
    modality = str(header.get('Modality', ''))
    if modality not in ('OP', 'OT', 'XC', ''):
        raise UserError(f'not a fundus photograph: modality {modality}')
    if int(header.get('NumberOfFrames', 1) or 1) != 1:
        raise UserError(f'{header.NumberOfFrames} frames; only single pictures are read')
    marked = str(header.get('BurnedInAnnotation', '')).upper() == 'YES'
    if marked and not burned_in:
        raise UserError(
            'text is burned into the picture (BurnedInAnnotation is YES); `mask` '
            'blackens what lies outside the field of view, `burned_in_text` accepts '
            'the picture as it is'
        )
    patient = str(header.get('PatientID', '')).strip()
    if not patient:
        raise UserError('no PatientID: whose photograph it is cannot be told')
    side = str(header.get('ImageLaterality', '') or header.get('Laterality', '')).strip().upper()
    date = str(header.get('StudyDate', '') or header.get('AcquisitionDateTime', ''))[:8]
    return DicomPhotograph(path, patient, _EYES.get(side, ''), date, marked)


def photograph_table(photographs: list[DicomPhotograph], ids: list[str]) -> pd.DataFrame:
    """The label table of `photographs`: id_code, patient_id and, where known, eye and visit.

    Visits are numbered from 0 by study date within a patient; the dates stay behind. Columns that
    not every file fills are left out.
    """
    columns: dict[str, list] = {'id_code': ids, 'patient_id': [p.patient for p in photographs]}
    if all(p.eye for p in photographs):
        columns['eye'] = [p.eye for p in photographs]
    if all(p.date for p in photographs):
        dates: dict[str, set[str]] = {}
        for p in photographs:
            dates.setdefault(p.patient, set()).add(p.date)
        order = {patient: sorted(days) for patient, days in dates.items()}
        columns['visit'] = [order[p.patient].index(p.date) for p in photographs]
    return pd.DataFrame(columns)


def load_dicom(path: Path) -> Image.Image:
    """The picture of one DICOM file as PIL RGB, without its metadata.

    16-bit samples are scaled by the bits they use, MONOCHROME1 is inverted, palettes are looked
    up, YBR is converted. Raises UserError with the reason when it cannot be decoded.
    """
    _pydicom()
    try:
        dataset = _read(path)
        _check_size(path, dataset)
        from pydicom.pixels import apply_color_lut

        values = decode_pixels(path, dataset)
        if dataset.PhotometricInterpretation == 'PALETTE COLOR':
            values, bits = apply_color_lut(values, dataset), _palette_bits(dataset)
        else:
            bits = int(dataset.BitsStored)
        if dataset.PhotometricInterpretation == 'MONOCHROME1':
            values = (1 << bits) - 1 - values
        if int(dataset.get('PixelRepresentation', 0)):
            raise UserError(f'{path}: signed pixels are no photograph')
        return _to_rgb(values, bits, path)
    except UserError:
        raise
    except Exception as error:  # damaged pixels make the decoders fail in any way
        remedy = f'; {INSTALL}' if 'missing dependencies' in str(error) else ''
        raise UserError(f'{path} cannot be decoded ({_line(error)}){remedy}') from error


def _read(path: Path, **options: object) -> 'Dataset':
    pydicom = _pydicom()
    syntax = pydicom.filereader.read_file_meta_info(path).get('TransferSyntaxUID', '')
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:  # unpacked whole, whatever its size
        raise UserError(f'{path}: a deflated data set; unpack it, as with gdcmconv --raw')
    return pydicom.dcmread(path, **options)


def _check_size(path: Path, dataset: 'Dataset') -> None:
    """UserError when the header claims more than one picture of 8 or 16 bits of a sane size."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > (Image.MAX_IMAGE_PIXELS or 1 << 27):
        raise UserError(f'{path}: {columns} x {rows} pixels are too many')
    if int(dataset.get('NumberOfFrames', 1) or 1) != 1:
        raise UserError(f'{path}: {dataset.NumberOfFrames} frames; only single pictures are read')
    if int(dataset.BitsAllocated) not in (8, 16):
        raise UserError(f'{path}: {dataset.BitsAllocated} bits per sample; 8 and 16 are read')


def _palette_bits(dataset: 'Dataset') -> int:
    return int(dataset.RedPaletteColorLookupTableDescriptor[2])


def _to_rgb(values: Num[np.ndarray, 'H W *c'], bits: int, path: Path) -> Image.Image:
    """Samples [H, W] or [H, W, 3] of `bits` bits -> PIL RGB."""
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, 2)
    if values.ndim != 3 or values.shape[2] != 3:
        raise UserError(f'{path}: pixels of shape {values.shape}; want a grey or colour picture')
    if bits != 8:
        values = np.rint(values.astype(np.float64) * (255 / ((1 << bits) - 1)))
    return Image.fromarray(np.ascontiguousarray(np.clip(values, 0, 255).astype(np.uint8)))


def _pydicom() -> ModuleType:
    try:
        import pydicom  # optional: only those who have DICOM files need it
    except ImportError as error:
        raise UserError(f'DICOM files need pydicom; {INSTALL}') from error
    return pydicom


def _line(error: BaseException) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
