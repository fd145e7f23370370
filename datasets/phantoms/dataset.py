"""Folders of phantoms with a table of grades, patients, eyes and visits."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int
from PIL import Image

from datasets.phantoms.render import EYES, render_phantom
from utils.errors import UserError
from utils.images import save_png
from utils.io import write_csv
from utils.logs import progress
from utils.seeds import numpy_generator

GRADE_SHARES = (0.5, 0.12, 0.22, 0.08, 0.08)  # towards a screening population, rare grades kept
MIN_SIZE, MAX_SIZE = 32, 1024


def draw_grades(
    n_patients: int, shares: Sequence[float], seed: int
) -> Int[np.ndarray, '{n_patients} 2']:
    """A grade per patient and eye, [n, 2]; fellow eyes differ by at most one grade."""
    rng = numpy_generator(seed, 'grades')
    shares = np.asarray(shares, dtype=float)
    first = rng.choice(len(shares), n_patients, p=shares / shares.sum())
    other = np.clip(first + rng.choice([-1, 0, 1], n_patients, p=[0.15, 0.7, 0.15]), 0, 4)
    other = np.where(first == 0, np.where(rng.random(n_patients) < 0.93, 0, 1), other)
    return np.stack([first, other], 1)


def draw_progression(n_patients: int, visits: int, chance: float, seed: int) -> np.ndarray:
    """By how many grades each patient's eyes have risen since the first visit, [n, 2, visits]."""
    rises = numpy_generator(seed, 'progression').random((n_patients, 2, visits)) < chance
    rises[..., 0] = False
    return rises.cumsum(2)


def make_dataset(
    out_dir: str | Path,
    *,
    n_patients: int,
    size: int,
    seed: int = 0,
    eyes: Sequence[str] = EYES,
    visits: int = 1,
    grade_shares: Sequence[float] = GRADE_SHARES,
    progression: float = 0.0,
    masks: bool = False,
    workers: int = 1,
) -> pd.DataFrame:
    """Writes images/<id_code>.png, labels.csv and, on request, masks/<id_code>.png.

    labels.csv: id_code, diagnosis (0-4), patient_id, eye, visit. Returns it as a DataFrame.
    progression: the chance that an eye's grade rises by one from a visit to the next; its lesions
    are then others, its vessels the same. UserError when out_dir already holds a data set.
    """
    out_dir = Path(out_dir)
    if (out_dir / 'labels.csv').exists() or (out_dir / 'images').exists():
        raise UserError(f'{out_dir} already holds a data set; choose another folder')
    grades = draw_grades(n_patients, grade_shares, seed)
    rises = draw_progression(n_patients, visits, progression, seed)
    jobs = [
        (
            out_dir,
            seed,
            p,
            e,
            v,
            min(4, int(grades[p, i := EYES.index(e)] + rises[p, i, v])),
            size,
            masks,
        )
        for p in range(n_patients)
        for e in eyes
        for v in range(visits)
    ]
    (out_dir / 'images').mkdir(parents=True)
    _write_all(jobs, workers)
    rows = [
        {
            'id_code': _id_code(p, e, v),
            'diagnosis': g,
            'patient_id': f'p{p:05d}',
            'eye': e,
            'visit': v,
        }
        for _, _, p, e, v, g, _, _ in jobs
    ]
    table = pd.DataFrame(rows)
    write_csv(out_dir / 'labels.csv', table)
    return table


def _id_code(patient: int, side: str, visit: int) -> str:
    return f'p{patient:05d}_{side}_{visit}'


def _write_all(jobs: Sequence[tuple], workers: int) -> None:
    bar = progress(total=len(jobs), desc='phantoms', unit='img')
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            for _ in pool.map(_write_one, jobs, chunksize=16):
                bar.update()
    else:
        for job in jobs:
            _write_one(job)
            bar.update()
    bar.close()


def _write_one(job: tuple) -> None:
    out_dir, seed, patient, side, visit, grade, size, masks = job
    phantom = render_phantom(
        seed=seed, patient=patient, eye=side, visit=visit, grade=grade, size=size
    )
    name = f'{_id_code(patient, side, visit)}.png'
    save_png(Image.fromarray(phantom.image), out_dir / 'images' / name)
    if masks:
        save_png(
            Image.fromarray(phantom.vessel_mask.astype(np.uint8) * 255), out_dir / 'masks' / name
        )
