"""Who is one person: patients, and photographs with the same pixels."""

import argparse
import shutil

import pandas as pd
import pytest
from conftest import load_script
from PIL import Image
from release_fixture import save_photographs

from datasets.digests import read_digests
from datasets.people import merge_identical, person_numbers, shown_elsewhere
from datasets.table import read_table


def table_of(folder, n, **columns):
    frame = save_photographs(folder, n)
    frame.assign(**columns).to_csv(folder / 'labels.csv', index=False)
    return folder


def test_any_shared_key_makes_one_person():
    assert person_numbers(['a', 'b', 'a']) == [0, 1, 0]
    # 0 and 2 share a file, 2 and 3 a patient: all three are one person.
    assert person_numbers(['f', 'g', 'f', 'h'], ['p', 'q', 'r', 'r']) == [0, 1, 0, 0]
    assert person_numbers([None, None]) == [0, 1]


def test_equal_pixels_have_equal_digests(tmp_path):
    save_photographs(tmp_path, 3)
    paths = sorted((tmp_path / 'images').iterdir())
    with Image.open(paths[0]) as picture:
        picture.save(paths[1].with_suffix('.bmp'))
    before = read_digests([*paths, paths[1].with_suffix('.bmp')])
    assert before.pixels[0] == before.pixels[3] and len(set(before.pixels)) == 3
    paths[2].write_bytes(paths[1].read_bytes())  # what stands under a name may change
    after = read_digests(paths)
    assert after.pixels[1] == after.pixels[2] and after.files != read_digests(paths[:2]).files


@pytest.mark.parametrize('patients', [None, ['d', 'c', 'b', 'a']])
def test_identical_photographs_get_one_patient(tmp_path, patients):
    columns = {} if patients is None else {'patient_id': patients}
    folder = table_of(tmp_path, 4, **columns)
    table = read_table(folder / 'labels.csv', folder / 'images')
    assert merge_identical(table) is table
    shutil.copy(table.paths[0], table.paths[2])
    merged = merge_identical(table)
    assert merged.patients == (
        ['eye000x', 'eye001x', 'eye000x', 'eye003x'] if patients is None else ['b', 'c', 'b', 'a']
    )


def test_people_of_other_tables_are_found(tmp_path):
    first = table_of(tmp_path / 'a', 4, patient_id=['p0', 'p1', 'p2', 'p3'])
    second = table_of(
        tmp_path / 'b', 3, patient_id=['q0', 'p1', 'q2'], id_code=['new0', 'new1', 'new2']
    )
    for i in range(3):
        source = second / f'images/eye{i:03d}x.png'
        with Image.open(source) as picture:
            picture.rotate(90).save(second / f'images/new{i}.png')
        source.unlink()
    shutil.copy(first / 'images/eye003x.png', second / 'images/new2.png')
    tables = [read_table(f / 'labels.csv', f / 'images') for f in (second, first)]
    assert shown_elsewhere(*tables) == [False, True, True]
    without_files = read_table(first / 'labels.csv', ids_only=True)
    assert shown_elsewhere(tables[0], without_files) == [False, True, False]
    renamed = pd.read_csv(second / 'labels.csv').assign(id_code=['eye000x', 'x', 'y'])
    renamed.to_csv(second / 'labels.csv', index=False)
    ids = read_table(second / 'labels.csv', ids_only=True)
    assert shown_elsewhere(ids, without_files) == [True, True, False]


def test_probes_of_features_keep_identical_photographs_together(tmp_path):
    folder = table_of(tmp_path, 4)
    shutil.copy(folder / 'images/eye001x.png', folder / 'images/eye002x.png')
    options = argparse.Namespace(
        labels=folder / 'labels.csv',
        labels_image_dir=folder / 'images',
        quality_split=None,
        quality_images=10,
        seed=0,
    )
    table = load_script('train_content_encoder').quality_table(options)
    assert table.patients == ['eye000x', 'eye001x', 'eye001x', 'eye003x']
