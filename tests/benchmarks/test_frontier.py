"""benchmarks/frontier.py --run: a finished run's groups and pictures, and the rows made of them."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import frontier
from benchmarks.appraisal import Photographs
from benchmarks.releases import ROWS
from utils.errors import UserError
from utils.io import write_json

SIDE = 64


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of six photographs in groups of three, whose release is named against their order."""
    photos, run = tmp_path / 'photos', tmp_path / 'run'
    for folder in (photos, run / 'private', run / 'release/images'):
        folder.mkdir(parents=True)
    ids = [f'p{i}' for i in range(6)]
    for i, name in enumerate(ids):
        Image.new('RGB', (SIDE, SIDE), (i, i, i)).save(photos / f'{name}.png')
    table = pd.DataFrame({'id_code': ids, 'diagnosis': [0, 1, 2, 3, 4, 0], 'patient_id': ids})
    table.to_csv(photos / 'labels.csv', index=False)
    names = ['zz', 'aa', 'zz', 'aa', 'zz', 'aa']
    table.assign(release_name=names).to_csv(run / 'private/groups.csv', index=False)
    for name, level in (('zz', 100), ('aa', 200)):
        Image.new('RGB', (SIDE, SIDE), (level,) * 3).save(run / f'release/images/{name}.png')
    options = {'df': str(photos / 'labels.csv'), 'data_path': str(photos)}
    write_json(run / 'private/options.json', {'options': options})
    np.save(run / 'private/latents.npy', np.zeros((6, 2, 3), np.float32))

    def described(table, cache, device, *, mirror_left):
        pictures = np.zeros((len(table), 3, SIDE, SIDE), np.uint8)
        return Photographs(pictures, table.grades, np.array(table.patients), {})

    monkeypatch.setattr(frontier, 'described', described)
    return frontier.finished_run(run, tmp_path, torch.device('cpu'))


def test_a_run_gives_each_picture_its_own_members(finished):
    assert finished.k == 3
    assert [g.tolist() for g in finished.groups] == [[1, 3, 5], [0, 2, 4]]
    assert finished.pictures[:, 0, 0, 0].tolist() == [200, 100]
    assert len(finished.ws) == len(finished.members.people) == 6


def test_rows_of_a_run_have_its_group_size(finished):
    opts = argparse.Namespace(rows=None, run=Path('run'))
    assert frontier.wanted_rows(opts, finished) == []
    opts.rows = ['photographs']
    assert frontier.wanted_rows(opts, finished) == ['photographs']
    opts.rows = ['pixel average']
    with pytest.raises(UserError, match='groups of 5, the groups of --run run are of 3'):
        frontier.wanted_rows(opts, finished)
    opts.rows = None
    assert frontier.wanted_rows(opts, None) == list(ROWS)


def test_rows_of_a_run_are_kept_by_themselves(tmp_path):
    files = {
        frontier.row_file(argparse.Namespace(run=run, out_dir=tmp_path), 'pixel average').name
        for run in (None, tmp_path / 'a', tmp_path / 'b')
    }
    assert len(files) == 3
