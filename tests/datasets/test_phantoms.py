"""Fundus phantoms: what is shared, what differs, and the data set that is written."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import affine_transform, binary_dilation

from datasets.phantoms import EYES, GRADES, draw_grades, make_dataset, render_phantom
from datasets.table import read_table
from scripts import make_phantoms as script
from utils.errors import UserError

SIZE = 160
SEVERE = {'new_vessels', 'preretinal_haemorrhage', 'fibrous_tissue'}


def phantom(patient=0, eye='right', visit=0, grade=0, *, seed=0, size=SIZE):
    return render_phantom(seed=seed, patient=patient, eye=eye, visit=visit, grade=grade, size=size)


def aligned(mask, marks, target, *, mirror=False):
    """`mask` moved, turned and scaled so that its (disc, fovea) come to lie on those of `target`.

    mirror: flip it left to right before.
    """
    marks = [complex(*p) for p in marks]
    if mirror:
        mask, marks = mask[:, ::-1], [mask.shape[1] - p.real + 1j * p.imag for p in marks]
    disc, fovea = (complex(*p) for p in target)
    turn = (marks[0] - marks[1]) / (disc - fovea)  # from target to source coordinates
    shift = marks[1] - turn * fovea
    c, s = turn.real, turn.imag
    # affine_transform counts (row, column) from pixel centres, the marks from the corner.
    matrix = np.array([[c, s], [-s, c]])
    offset = np.array([shift.imag, shift.real]) + matrix @ [0.5, 0.5] - 0.5
    return affine_transform(mask.astype(float), matrix, offset, order=1) > 0.5


def overlap(a, b):
    """Share of each mask within a pixel of the other, averaged."""
    grow = np.ones((3, 3), bool)
    return (
        (a & binary_dilation(b, grow)).sum() / a.sum()
        + (b & binary_dilation(a, grow)).sum() / b.sum()
    ) / 2


def same_tree(a, b, **options):
    return overlap(
        a.vessel_mask, aligned(b.vessel_mask, (b.disc, b.fovea), (a.disc, a.fovea), **options)
    )


# --- one phantom ------------------------------------------------------------------------------


def test_a_phantom_is_a_function_of_its_names():
    one, two = phantom(grade=3), phantom(grade=3)
    assert one.image.dtype == np.uint8 and one.image.shape == (SIZE, SIZE, 3)
    assert one.vessel_mask.dtype == bool and one.vessel_mask.shape == (SIZE, SIZE)
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.vessel_mask, two.vessel_mask) and one.lesions == two.lesions
    others = [
        phantom(1, grade=3),
        phantom(eye='left', grade=3),
        phantom(visit=1, grade=3),
        phantom(grade=2),
        phantom(grade=3, seed=1),
    ]
    for a, b in itertools.combinations([one, *others], 2):
        assert not np.array_equal(a.image, b.image)


def test_looks_like_a_fundus_photograph():
    for patient in range(6):
        p = phantom(patient)
        image = p.image.astype(float)
        assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
        r = np.hypot(x, y)
        assert image[r > 0.5 * SIZE].max() == 0 and image[r < 0.4 * SIZE].mean() > 30
        retina = image[r < 0.4 * SIZE].mean(0)
        assert retina[0] > retina[1] > retina[2]
        column, row = (int(v) for v in p.disc)
        near = np.hypot(x + SIZE / 2 - p.disc[0], y + SIZE / 2 - p.disc[1]) < 0.03 * SIZE
        assert near[row, column]
        assert image[near, 1].mean() > 1.2 * image[r < 0.4 * SIZE, 1].mean()
        assert 0.03 < p.vessel_mask[r < 0.4 * SIZE].mean() < 0.35
        # Vessels are darker than what is around them.
        inside = r < 0.45 * SIZE
        around = binary_dilation(p.vessel_mask, iterations=3) & ~p.vessel_mask & inside
        assert image[p.vessel_mask & inside, 1].mean() < 0.95 * image[around, 1].mean()


def test_visits_share_vessels_but_no_pixels():
    same, other = [], []
    for patient in range(4):
        first, again, stranger = phantom(patient), phantom(patient, visit=1), phantom(patient + 10)
        inside = first.image.max(2) > 20
        assert (first.image != again.image).any(2)[inside].mean() > 0.9
        same.append(same_tree(first, again))
        other.append(same_tree(first, stranger))
    assert min(same) > 0.85 and max(other) < min(same) - 0.15


def test_visits_share_lesions():
    first, again = phantom(2, grade=4), phantom(2, visit=1, grade=4)
    assert first.lesions and again.lesions
    kinds = {p.kind for p in first.lesions} & {p.kind for p in again.lesions}
    assert kinds
    degree = [abs(complex(*p.disc) - complex(*p.fovea)) for p in (first, again)]

    def places(p, scale):
        return [
            (
                round(abs(complex(m.x, m.y) - complex(*p.fovea)) / scale, 3),
                round(abs(complex(m.x, m.y) - complex(*p.disc)) / scale, 3),
            )
            for m in p.lesions
        ]

    common = set(places(first, degree[0])) & set(places(again, degree[1]))
    assert len(common) > 0.6 * min(len(first.lesions), len(again.lesions))


def test_eyes_are_mirrored_and_yet_distinct():
    for patient in range(3):
        right, left = phantom(patient, 'right'), phantom(patient, 'left')
        assert right.disc[0] > right.fovea[0] and left.disc[0] < left.fovea[0]
        again = phantom(patient, 'right', visit=1)
        assert same_tree(right, left, mirror=True) < same_tree(right, again) - 0.15


def test_size_changes_the_sampling_alone():
    small, large = phantom(size=64), phantom(size=256)
    assert np.allclose(np.array(small.disc) / 64, np.array(large.disc) / 256)
    reduced = np.asarray(Image.fromarray(large.image).resize((64, 64), Image.Resampling.BOX))
    difference = reduced.astype(float) - small.image
    assert abs(difference.mean()) < 2 and np.abs(difference).mean() < 8


@pytest.mark.parametrize('options', [{'eye': 'middle'}, {'grade': 5}, {'grade': -1}, {'size': 8}])
def test_impossible_phantoms(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        phantom(**options)


# --- grades -----------------------------------------------------------------------------------


def test_grades_add_lesions_only():
    for patient in range(4):
        healthy = phantom(patient)
        assert healthy.lesions == ()
        for grade in (1, 2):
            ill = phantom(patient, grade=grade)
            assert (ill.disc, ill.fovea) == (healthy.disc, healthy.fovea)
            assert np.array_equal(ill.vessel_mask, healthy.vessel_mask)
            changed = np.abs(ill.image.astype(int) - healthy.image).max(2) > 2
            y, x = np.mgrid[:SIZE, :SIZE] + 0.5
            near = np.zeros_like(changed)
            for mark in ill.lesions:
                near |= np.hypot(x - mark.x, y - mark.y) < 3.6 * mark.radius + 4
            assert changed.any() and (changed & near).sum() > 0.98 * changed.sum()
            assert changed.mean() < 0.3
        # Severe grades change the calibre of veins and add vessels, and remove none.
        severe = phantom(patient, grade=4)
        kept = binary_dilation(severe.vessel_mask) & healthy.vessel_mask
        assert kept.sum() > 0.97 * healthy.vessel_mask.sum()


def test_grades_follow_the_clinical_scale():
    found = {
        grade: [phantom(patient, grade=grade, size=64).lesions for patient in range(8)]
        for grade in GRADES
    }
    kinds = {g: {m.kind for lesions in found[g] for m in lesions} for g in GRADES}
    counts = {g: np.mean([len(lesions) for lesions in found[g]]) for g in GRADES}
    assert kinds[0] == set() and kinds[1] == {'microaneurysm'}
    assert all(found[1]) and counts[1] < counts[2] < counts[3]
    assert {'dot_haemorrhage', 'blot_haemorrhage', 'hard_exudate'} <= kinds[2]
    assert 'cotton_wool_spot' in kinds[2] | kinds[3]
    assert not SEVERE & (kinds[1] | kinds[2] | kinds[3])
    assert 'new_vessels' in kinds[4] and SEVERE & kinds[4]
    bleedings = [sum('haemorrhage' in m.kind for m in lesions) for lesions in found[3]]
    assert min(bleedings) >= 20


def test_lesions_lie_in_the_field():
    for patient in range(4):
        for mark in phantom(patient, grade=3).lesions:
            assert np.hypot(mark.x - SIZE / 2, mark.y - SIZE / 2) < 0.5 * SIZE
            assert mark.radius > 0


def test_grade_shares():
    grades = draw_grades(4000, (0.5, 0.12, 0.22, 0.08, 0.08), seed=1)
    assert grades.shape == (4000, 2) and set(np.unique(grades)) == set(GRADES)
    share = np.bincount(grades[:, 0], minlength=5) / 4000
    assert np.abs(share - (0.5, 0.12, 0.22, 0.08, 0.08)).max() < 0.03
    assert np.abs(grades[:, 0] - grades[:, 1]).max() == 1
    assert np.array_equal(grades, draw_grades(4000, (0.5, 0.12, 0.22, 0.08, 0.08), seed=1))
    assert set(np.unique(draw_grades(200, (0, 0, 1, 0, 0), seed=0)[:, 0])) == {2}


# --- the data set -----------------------------------------------------------------------------


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and p.name != 'options.json'
    }


def command(out_dir, *more):
    return ['--out_dir', str(out_dir), '--n_patients', '4', '--size', '48', *more]


def test_script_writes_a_data_set(tmp_path):
    out = tmp_path / 'one'
    assert script.main(command(out, '--visits', '2', '--masks', '--seed', '3')) == 0
    frame = pd.read_csv(out / 'labels.csv')
    assert list(frame) == ['id_code', 'diagnosis', 'patient_id', 'eye', 'visit']
    assert len(frame) == 4 * 2 * 2 and frame.id_code.is_unique
    assert set(frame.eye) == set(EYES) and set(frame.visit) == {0, 1}
    assert frame.groupby(['patient_id', 'eye']).diagnosis.nunique().max() == 1
    table = read_table(out / 'labels.csv', require_label=True)
    assert table.patients[0] == 'p00000' and len(set(table.patients)) == 4
    for row, path in zip(frame.itertuples(), table.paths):
        want = phantom(int(row.patient_id[1:]), row.eye, row.visit, row.diagnosis, seed=3, size=48)
        assert np.array_equal(np.asarray(Image.open(path)), want.image)
        mask = np.asarray(Image.open(out / 'masks' / path.name))
        assert np.array_equal(mask, want.vessel_mask * np.uint8(255))
    assert (out / 'contact_sheet.png').is_file()

    again = tmp_path / 'two'
    assert (
        script.main(command(again, '--visits', '2', '--masks', '--seed', '3', '--workers', '2'))
        == 0
    )
    assert files(out) == files(again)
    with pytest.raises(UserError, match='already holds a run'):
        script.main(command(out))


def test_script_options(tmp_path):
    out = tmp_path / 'left'
    assert script.main(command(out, '--eyes', 'left', '--grades', '0,0,0,1,0')) == 0
    frame = pd.read_csv(out / 'labels.csv')
    assert set(frame.eye) == {'left'} and set(frame.diagnosis) == {3} and len(frame) == 4
    assert not (out / 'masks').exists()


def test_a_data_set_is_not_overwritten(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(UserError, match='already holds'):
        make_dataset(tmp_path, n_patients=1, size=32)


@pytest.mark.parametrize(
    'more',
    [
        ['--grades', '1,2'],
        ['--grades', '0,0,0,0,0'],
        ['--grades', 'a,b,c,d,e'],
        ['--grades', '1,1,1,1,-1'],
        ['--eyes', 'third'],
        ['--visits', '0'],
        ['--n_patients', '0'],
        ['--workers', '0'],
        ['--seed', '-1'],
    ],
)
def test_script_refuses_flags(more, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(command(tmp_path / 'x', *more))
    assert more[0] in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('size', [8, 4096])
def test_script_refuses_sizes(size, tmp_path):
    with pytest.raises(UserError, match='choose 32 to 1024'):
        script.main(command(tmp_path / 'x', '--size', str(size)))
    assert not (tmp_path / 'x').exists()
