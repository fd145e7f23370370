"""The table of photographs: columns of the common sets, and one clear error for bad rows."""

import pytest
from PIL import Image

from datasets.digests import read_digests
from datasets.table import Table, read_table, without_patients
from utils.errors import UserError


def make(folder, text, names):
    (folder / 'images').mkdir()
    for name in names:
        Image.new('RGB', (8, 8)).save(folder / 'images' / name)
    (folder / 'labels.csv').write_text(text)
    return folder / 'labels.csv'


def test_aptos_columns(tmp_path):
    table = read_table(make(tmp_path, 'id_code,diagnosis\nb,2\na,0\n', ['a.png', 'b.jpeg']))
    assert table.ids == ['b', 'a']
    assert [p.name for p in table.paths] == ['b.jpeg', 'a.png']
    assert table.labels.tolist() == [2, 0]
    assert table.patients is None and table.eyes is None


def test_eyepacs_names_give_patients_and_eyes(tmp_path):
    csv = make(tmp_path, ',image,level\n0,7_left,0\n1,7_right,1\n', ['7_left.jpeg', '7_right.jpeg'])
    table = read_table(csv)
    assert table.patients == ['7', '7'] and table.eyes == ['left', 'right']


def test_one_odd_id_does_not_switch_patients_off(tmp_path):
    ids = [f'{n}_{side}' for n in range(4) for side in ('left', 'right')]
    csv = make(tmp_path, '\n'.join(['id_code', *ids, 'extra01']), [])
    with pytest.raises(UserError, match='1 of 9 ids are not of the form(.|\n)*extra01'):
        read_table(csv, ids_only=True)
    csv.write_text('\n'.join(['id_code', 'a_left', 'a_right', 'x', 'y', 'z']))
    with pytest.raises(UserError, match='3 of 5 ids are not of the form'):
        read_table(csv, ids_only=True)
    csv.write_text('id_code\n1.2_left.png\n1.2_right.png\n1.3_left.png\n')
    assert read_table(csv, ids_only=True).patients == ['1.2', '1.2', '1.3']


def test_patients_in_any_letters(tmp_path, caplog):
    csv = make(tmp_path, 'id_code,patient_id\na,P1\nb,p1\nc,p2\n', [])
    assert read_table(csv, ids_only=True).patients == ['P1', 'P1', 'p2']
    assert 'P1 and p1' in caplog.text


def test_one_id_in_several_spellings_is_one_patient(tmp_path):
    ids = ['7', '007', '7.0', '\uff17', 'caf\u00e9', 'cafe\u0301', 'Caf\u00e9\u200b', '7a', '70']
    rows = '\n'.join(f'i{n},{v}' for n, v in enumerate(ids))
    csv = make(tmp_path, f'id_code,patient_id\n{rows}\n', [])
    people = read_table(csv, ids_only=True).patients
    assert people == ['7'] * 4 + ['caf\u00e9'] * 3 + ['7a', '70']


def test_ids_with_suffixes_find_files_of_another(tmp_path):
    csv = make(tmp_path, 'filename\nimg1.jpg\n1.2.840\n', ['img1.png', '1.2.840.png'])
    assert [p.name for p in read_table(csv).paths] == ['img1.png', '1.2.840.png']
    csv.write_text('filename\nimg1.jpg\nimg1.png\n')
    with pytest.raises(UserError, match='several ids of one image(.|\n)*img1.jpg, img1.png'):
        read_table(csv)


def test_split_and_subset(tmp_path):
    csv = make(
        tmp_path, 'id_code,patient_id,eye,split\na,p,OS,train\nb,q,OD,val\n', ['a.png', 'b.png']
    )
    table = read_table(csv, split='val')
    assert table.ids == ['b'] and table.eyes == ['right'] and table.paths[0].name == 'b.png'
    with pytest.raises(UserError, match='it has train, val'):
        read_table(csv, split='test')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('name_of_file,diagnosis\na,1\n', 'no id column'),
        ('id_code\na\nmissing1\nmissing2\n', r'2 of 3 ids(.|\n)*missing1\n(.|\n)*missing2'),
        ('id_code\na\na\n', 'duplicate ids(.|\n)*rows 2 and 3'),
        ('id_code\na\n""\n', 'empty ids'),
        ('id_code,diagnosis\na,5\n', 'grades from 0 to 4'),
        ('id_code,diagnosis\na,\n', 'grades from 0 to 4'),
        ('id_code,patient_id\na,\n', 'patient_id is empty'),
        ('id_code\ntwo\n', 'more than one image'),
        ('id_code\n', 'no rows'),
    ],
)
def test_bad_tables(tmp_path, text, message):
    csv = make(tmp_path, text, ['a.png', 'two.png', 'two.jpg'])
    with pytest.raises(UserError, match=message):
        read_table(csv)


def test_missing_table_and_folder(tmp_path):
    with pytest.raises(UserError, match='table not found'):
        read_table(tmp_path / 'none.csv')
    csv = make(tmp_path, 'id_code\na\n', ['a.png'])
    with pytest.raises(UserError, match='image folder not found'):
        read_table(csv, tmp_path / 'elsewhere')


@pytest.mark.parametrize(
    'column', ['patientid', 'Patient_ID', 'Patient', 'pateint_id', 'person_no', 'MRN', 'SubjectID']
)
def test_columns_that_look_like_patients_are_named(column, tmp_path):
    table = read_table(make(tmp_path, f'id_code,diagnosis,{column},camera\na,0,7,x\n', ['a.png']))
    assert table.patients is None and table.unit == 'photographs'
    said = without_patients(table)
    assert 'has no column patient_id: every photograph is taken for another person' in said
    assert f'if {column} holds the patients, rename it' in said


def test_tables_without_patients_are_told_to_add_them(tmp_path):
    text = 'id_code,diagnosis,eye,visit,split,image_quality,age\na,0,left,1,x,3,50\n'
    assert '; add it (' in without_patients(read_table(make(tmp_path, text, ['a.png'])))
    assert 'The table has no column' in without_patients(Table(['a'], []))


def test_damaged_images_are_listed_together(tmp_path):
    csv = make(tmp_path, 'id_code\na\nb\nc\n', ['a.png', 'b.png', 'c.png'])
    (tmp_path / 'images' / 'b.png').write_text('not a picture')
    whole = (tmp_path / 'images' / 'c.png').read_bytes()
    (tmp_path / 'images' / 'c.png').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r'2 of 3 images(.|\n)*b\.png(.|\n)*c\.png'):
        read_digests(read_table(csv).paths)


@pytest.mark.parametrize(
    'name',
    [
        'labels.csv',
        'labels.csv.gz',
        'labels.csv.zip',
        'labels.csv.xz',
        'labels.csv.bz2',
        'labels.csv.zst',
    ],
)
@pytest.mark.parametrize(
    'data',
    [b'', b'\x1f\x8b\x08\x00cut', b'PK\x03\x04', b'\x00' * 40, b'\xff\xfe\x00', b'"id_code\n'],
)
def test_damaged_tables_of_any_packing_are_named(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match='labels.csv'):
        read_table(tmp_path / name)
