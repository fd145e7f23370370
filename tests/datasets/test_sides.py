"""The side of the optic disc: found on phantoms, mirrored on request, told in the report."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import load_script
from PIL import Image, ImageOps

from datasets.phantoms import make_dataset
from datasets.pictures import load_pictures
from datasets.sides import disc_to_the_right, find_disc, shown_sides


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp('sides') / 'phantoms'
    table = make_dataset(
        folder,
        n_patients=12,
        size=96,
        seed=5,
        visits=1,
        masks=False,
        eyes=('left', 'right'),
        grade_shares=(1, 1, 1, 1, 1),
        workers=1,
    )
    return folder, table


def test_discs_of_phantoms_lie_on_the_side_of_the_eye(phantoms: tuple[Path, pd.DataFrame]) -> None:
    folder, table = phantoms
    for name, eye in zip(table.id_code, table.eye):
        image = Image.open(folder / 'images' / f'{name}.png')
        place = find_disc(image)
        assert (place.x > 0) == (eye == 'right'), name
        # A mirror image has its disc at the mirrored place, as surely.
        other = find_disc(ImageOps.mirror(image))
        assert other == pytest.approx((-place.x, place.y, place.margin), abs=1e-3)
        turned, was = disc_to_the_right(image)
        assert was == (eye == 'left') and find_disc(turned).x > 0


def test_blank_pictures_get_an_answer() -> None:
    for level in (0, 255):
        place = find_disc(Image.new('RGB', (40, 30), (level,) * 3))
        assert np.isfinite(place).all()


def test_command_mirrors_and_reports(phantoms: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    folder, table = phantoms
    load_script('dataset_tool').main(
        [
            '--source',
            str(folder / 'labels.csv'),
            '--dest',
            str(tmp_path / 'one'),
            '--one_side',
            '--keep_names',
            '--width=64',
            '--workers=1',
        ]
    )
    report = pd.read_csv(tmp_path / 'one.report.csv')
    assert report.mirrored.tolist() == (table.eye == 'left').tolist()
    for file in (tmp_path / 'one').rglob('*.png'):
        assert find_disc(Image.open(file)).x > 0


def test_eyes_as_they_look(phantoms: tuple[Path, pd.DataFrame]) -> None:
    folder, table = phantoms
    pictures = load_pictures([folder / f'images/{name}.png' for name in table.id_code], 96)
    assert shown_sides(pictures) == list(table.eye)
    turned = {'left': 'right', 'right': 'left'}
    assert shown_sides(pictures[..., ::-1]) == [turned[eye] for eye in table.eye]
