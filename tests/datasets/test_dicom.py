"""DICOM files in: pixels of every kind, the table from tags, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from release_fixture import save_networks
from test_fov import photograph

from anonymization import Networks, OptimizeConfig, Settings, anonymize
from datasets import dicom_decode
from datasets.dicom import find_dicom, list_photographs, load_dicom, photograph_table
from datasets.table import read_table
from scripts import dataset_tool
from utils.errors import UserError

pydicom = pytest.importorskip('pydicom')
OP8, OP16 = '1.2.840.10008.5.1.4.1.1.77.1.5.1', '1.2.840.10008.5.1.4.1.1.77.1.5.2'
OCT, CAPTURE = '1.2.840.10008.5.1.4.1.1.77.1.5.4', '1.2.840.10008.5.1.4.1.1.7'


def write(
    path,
    pixels,
    *,
    kind=OP8,
    patient='P1',
    side='L',
    date='20240102',
    photometric='RGB',
    bits=8,
    **more,
):
    """One uncompressed file; pixels uint8 or uint16 [H, W(, 3)]."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientID, ds.ImageLaterality, ds.StudyDate = 'OP', patient, side, date
    ds.PatientName = 'Secret^Name'
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = 8 if pixels.dtype == np.uint8 else 16
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, 0
    ds.PixelData = pixels.tobytes()
    for key, value in more.items():
        setattr(ds, key, value)
    ds.save_as(path, enforce_file_format=True)
    return ds


@pytest.fixture
def eye():
    return np.array(photograph(200, 200, 150))


def test_pixels_by_value(tmp_path, eye):
    path = tmp_path / 'a.dcm'
    write(path, eye)
    assert np.array_equal(load_dicom(path), eye)
    write(path, (eye.astype(np.uint16) * 16), kind=OP16, bits=12)
    assert np.abs(np.array(load_dicom(path)).astype(int) - eye).max() <= 1
    grey = eye[..., 1].copy()
    write(path, grey, photometric='MONOCHROME2')
    assert np.array_equal(np.array(load_dicom(path))[..., 0], grey)
    write(path, grey, photometric='MONOCHROME1')
    assert np.array_equal(np.array(load_dicom(path))[..., 2], 255 - grey)
    ybr = np.array(Image.fromarray(eye).convert('YCbCr'))
    write(path, ybr, photometric='YBR_FULL')
    assert np.abs(np.array(load_dicom(path)).astype(int) - eye).max() <= 3


def test_palette_pixels(tmp_path):
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = np.arange(256, dtype=np.uint16)[::-1].copy()
    more = {}
    for colour in ('Red', 'Green', 'Blue'):
        more[f'{colour}PaletteColorLookupTableDescriptor'] = [256, 0, 16]
        more[f'{colour}PaletteColorLookupTableData'] = (table * 257).tobytes()
    write(tmp_path / 'p.dcm', index, kind=CAPTURE, photometric='PALETTE COLOR', **more)
    assert np.array_equal(np.array(load_dicom(tmp_path / 'p.dcm'))[..., 1], 255 - index)


def write_compressed(path: Path, eye: np.ndarray, codec: str) -> None:
    """One file of encapsulated 'JPEG' or 'JPEG2000', pixels uint8 [H, W, 3]."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000, JPEGBaseline8Bit

    buffer = io.BytesIO()
    quality = {'quality': 95} if codec == 'JPEG' else {'irreversible': True}
    Image.fromarray(eye).save(
        buffer, format=codec, **(quality if codec == 'JPEG' else {**quality, 'no_jp2': True})
    )
    ds = write(path, eye)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if codec == 'JPEG' else JPEG2000
    ds.PhotometricInterpretation = 'YBR_FULL_422' if codec == 'JPEG' else 'YBR_ICT'
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds['PixelData'].is_undefined_length = True
    ds.save_as(path)


@pytest.mark.parametrize('codec', ['JPEG', 'JPEG2000'])
def test_compressed_pixels(tmp_path, eye, codec):
    write_compressed(tmp_path / 'c.dcm', eye, codec)
    got = np.array(load_dicom(tmp_path / 'c.dcm')).astype(int)
    assert np.abs(got - eye).mean() < 3


def test_table_from_tags(tmp_path, eye):
    for i, (patient, side, date) in enumerate(
        [
            ('P1', 'L', '20240301'),
            ('P1', 'R', '20240301'),
            ('P1', 'L', '20230101'),
            ('P2', 'R', '20200101'),
        ]
    ):
        write(tmp_path / f'{i}.dcm', eye, patient=patient, side=side, date=date)
    found, refused = list_photographs(find_dicom(tmp_path))
    table = photograph_table(found, list('abcd'))
    assert not refused
    assert list(table.columns) == ['id_code', 'patient_id', 'eye', 'visit']
    assert list(table.visit) == [1, 1, 0, 0]
    assert list(table.eye) == ['left', 'right', 'left', 'right']
    assert '2024' not in table.to_csv()
    write(tmp_path / '4.dcm', eye, patient='P3', side='', date='')
    table = photograph_table(list_photographs(find_dicom(tmp_path))[0], list('abcde'))
    assert list(table.columns) == ['id_code', 'patient_id']


def test_what_is_no_fundus_photograph_is_listed_with_the_reason(tmp_path, eye):
    write(tmp_path / 'oct.dcm', eye, kind=OCT)
    write(tmp_path / 'film.dcm', eye, NumberOfFrames=3)
    write(tmp_path / 'text.dcm', eye, BurnedInAnnotation='YES')
    write(tmp_path / 'nobody.dcm', eye, patient='')
    (tmp_path / 'broken.dcm').write_bytes((tmp_path / 'oct.dcm').read_bytes()[:300])
    (tmp_path / 'letter.dcm').write_text('Dear colleague')
    found, refused = list_photographs(find_dicom(tmp_path))
    reasons = {p.name: r for p, r in refused}
    assert not found and len(refused) == 6
    assert 'Tomography' in reasons['oct.dcm'] and '3 frames' in reasons['film.dcm']
    assert '`mask`' in reasons['text.dcm'] and 'PatientID' in reasons['nobody.dcm']
    assert 'not a readable DICOM' in reasons['letter.dcm']
    assert [p.path.name for p in list_photographs(find_dicom(tmp_path), burned_in=True)[0]] == [
        'text.dcm'
    ]


def test_damaged_pixels_are_one_error(tmp_path, eye):
    write(tmp_path / 'a.dcm', eye)
    data = (tmp_path / 'a.dcm').read_bytes()
    (tmp_path / 'a.dcm').write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r'a\.dcm cannot be decoded'):
        load_dicom(tmp_path / 'a.dcm')


def harmed(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut short, or with one bit turned, anywhere behind the preamble."""
    if rng.random() < 0.25:
        return data[: rng.integers(len(data))]
    content = bytearray(data)
    content[rng.integers(128, len(data))] ^= 1 << rng.integers(8)
    return bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')  # pydicom tells what it tolerates
@pytest.mark.parametrize('codec', ['none', 'JPEG', 'JPEG2000'])
def test_flips_and_cuts_are_a_picture_or_one_error(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    if codec == 'none':
        write(tmp_path / 'a.dcm', eye)
    else:
        write_compressed(tmp_path / 'a.dcm', eye, codec)
        # What Pillow cannot decode goes to a slow process, tested on its own.
        monkeypatch.setattr(dicom_decode, '_decode_apart', lambda path: 1 / 0)
    data, rng = (tmp_path / 'a.dcm').read_bytes(), np.random.default_rng(1)
    path = tmp_path / 'x.dcm'
    ends = set()
    for _ in range(120):
        path.write_bytes(harmed(rng, data))
        found, refused = list_photographs([path])
        assert len(found) + len(refused) == 1
        try:
            ends.add(load_dicom(path).mode)
        except UserError as error:
            assert str(error).startswith(str(path)) and '\n' not in str(error)
            ends.add('error')
    assert ends == {'RGB', 'error'}


@pytest.mark.parametrize('at', [None, 2, 20])  # markers, without which gdcm aborts
def test_a_decoder_that_dies_is_one_error(
    tmp_path: Path, at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('gdcm')
    monkeypatch.setattr(dicom_decode, '_SURVIVE', ())  # as for lossless JPEG
    eye = np.full((24, 24, 3), (200, 90, 40), np.uint8)
    path = tmp_path / 'a.dcm'
    write_compressed(path, eye, 'JPEG')
    if at is None:
        assert np.abs(np.array(load_dicom(path)).astype(int) - eye).max() <= 4
        return
    data = bytearray(path.read_bytes())
    data[data.index(b'\xff\xd8') + at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'a\.dcm cannot be decoded \(RuntimeError: gdcm failed'):
        load_dicom(path)


@pytest.mark.parametrize(
    ('claim', 'message'),
    [
        ({'NumberOfFrames': 100_000}, '100000 frames'),
        ({'BitsAllocated': 64}, '64 bits per sample'),
        ({'Rows': 65535, 'Columns': 65535}, '65535 x 65535 pixels are too many'),
    ],
)
def test_headers_that_claim_too_much_take_no_memory(
    tmp_path: Path, eye: np.ndarray, claim: dict, message: str
) -> None:
    write(tmp_path / 'a.dcm', eye, **claim)
    with pytest.raises(UserError, match=f'a.dcm: {message}'):
        load_dicom(tmp_path / 'a.dcm')


def test_deflated_files_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    ds = write(tmp_path / 'a.dcm', np.zeros((1000, 1000, 3), np.uint8))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(tmp_path / 'a.dcm')
    assert (tmp_path / 'a.dcm').stat().st_size < 50_000
    with pytest.raises(UserError, match='a.dcm: a deflated data set; unpack it'):
        load_dicom(tmp_path / 'a.dcm')
    assert 'deflated' in list_photographs([tmp_path / 'a.dcm'])[1][0][1]


def test_dataset_tool_reads_a_folder_of_dicom_files(tmp_path, eye, capsys):
    folder = tmp_path / 'dicom'
    folder.mkdir()
    write(folder / '1.2.840.10', eye, side='L')  # named by its UID, without a suffix
    write(folder / '1.2.840.11', eye, side='R')
    write(folder / 'c.dcm', eye, kind=OCT)
    dest = tmp_path / 'cropped'
    assert (
        dataset_tool.main(
            [
                '--source',
                str(folder),
                '--dest',
                str(dest),
                '--transform',
                'fundus',
                '--width',
                '64',
                '--keep_names',
            ]
        )
        == 0
    )
    assert '2 images written' in capsys.readouterr().out
    table = read_table(dest / 'labels.csv', dest)
    assert table.ids == ['1.2.840.10', '1.2.840.11'] and table.eyes == ['left', 'right']
    assert table.patients == ['P1', 'P1']
    report = pd.read_csv(tmp_path / 'cropped.report.csv', keep_default_na=False)
    assert 'Tomography' in report.set_index('name').reason['c.dcm']
    written = b''.join(p.read_bytes() for p in dest.rglob('*') if p.is_file())
    assert b'Secret' not in written and b'20240102' not in written


def test_a_folder_of_dicom_files_becomes_a_release(tmp_path, eye):
    folder, crops = tmp_path / 'dicom', tmp_path / 'crops'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        shade = (eye * rng.uniform(0.6, 1, 3)).astype(np.uint8)
        write(folder / f'{i}.dcm', shade, patient=f'Patient{i // 2}', side='LR'[i % 2])
    flags = [f'--source={folder}', f'--dest={crops}', '--transform=fundus', '--width=64']
    assert dataset_tool.main([*flags, '--keep_names']) == 0
    save_networks(tmp_path)
    found = anonymize(
        read_table(crops / 'labels.csv', crops),
        Networks(tmp_path / 'psp.pt', tmp_path / 'content.pt'),
        Settings(k=5, optimize=OptimizeConfig(n_steps=1, n_crop=2)),
        tmp_path / 'run',
        workers=0,
    )
    assert found.audit.passed and [len(m) for m in found.groups.members] == [5, 5]
    written = b''.join(p.read_bytes() for p in found.folder.rglob('*') if p.is_file())
    assert not [word for word in (b'Secret', b'Patient0', b'20240102') if word in written]


def test_mixed_folders_are_refused(tmp_path, eye):
    write(tmp_path / 'a.dcm', eye)
    Image.fromarray(eye).save(tmp_path / 'b.png')
    with pytest.raises(UserError, match='two folders'):
        dataset_tool.main(
            ['--source', str(tmp_path), '--dest', str(tmp_path.parent / 'x.zip'), '--width', '64']
        )
