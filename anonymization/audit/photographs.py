"""The photographs behind a release, read a second time: each file is read and decoded once here.

What the run recorded of them is worked out anew and compared: which files they were, which show
the same picture, on which side their eye lies, and what the networks were given of them.
"""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from anonymization.audit.files import MAX_PICTURE, Fault, read_regular
from anonymization.audit.maps import Features, features
from datasets.pictures import OVERSAMPLING, decoding_scales
from datasets.sides import find_disc
from datasets.table import Table
from utils.errors import UserError
from utils.images import as_rgb, open_image, resize
from utils.logs import progress

COLUMNS = ('file', 'content', 'stored', 'eye')
_THREADS = 4


class Look(NamedTuple):
    """One photograph. file: SHA-256 of its bytes; content: of its pixels; stored: of what the
    encoder gets, uint8 [3, S, S]; eye: 'left', 'right' or ''; features: for the copy check."""

    file: str
    content: str
    stored: str
    eye: str
    features: Features


def look_again(table: Table, side: int, sides: str) -> list[Look]:
    """Looks at all photographs. side: S of the encoder; sides: the setting of the run.

    UserError for a photograph that cannot be read.
    """
    scales = decoding_scales(table.paths, OVERSAMPLING * side, threads=_THREADS)

    def one(i: int) -> Look:
        path = table.paths[i]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror})') from error
        with open_image(lambda: io.BytesIO(data), str(path)) as image:
            picture = as_rgb(image, scales[i])
        eye = table.eyes[i] if table.eyes is not None else ''
        if not eye and sides != 'mixed':
            eye = 'right' if find_disc(picture).x >= 0 else 'left'
        seen = np.asarray(resize(picture, side))
        if (eye, sides) == ('left', 'mirror'):
            seen = np.fliplr(seen)
        return Look(
            hashlib.sha256(data).hexdigest(),
            hashlib.sha256(f'{picture.size}'.encode() + picture.tobytes()).hexdigest(),
            hashlib.sha256(np.moveaxis(seen, 2, 0).tobytes()).hexdigest(),
            eye,
            features(np.asarray(picture)).astype(np.float16),  # exact: multiples of 1/2048
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(one, range(len(table)))
        return list(progress(looks, total=len(table), desc='looking again', unit='img'))


def read_records(private: Path, n: int) -> pd.DataFrame:
    """COLUMNS of photographs.csv, as text; UserError when it is missing or of other photographs."""
    path = private / 'photographs.csv'
    try:
        frame = pd.read_csv(
            io.BytesIO(read_regular(path, MAX_PICTURE)), dtype=str, keep_default_na=False
        )
        frame = frame[list(COLUMNS)]
    except Fault as error:
        raise UserError(f'{path} {error}; it says which photographs the run read') from error
    except (KeyError, ValueError) as error:
        raise UserError(f'{path} is not what a run recorded of its photographs: {error}') from error
    if len(frame) != n:
        raise UserError(f'{path} is about {len(frame)} photographs, not the {n} of the table')
    return frame


def stored_side(private: Path) -> int:
    """S of photographs.npy; UserError when it is missing or damaged."""
    path = private / 'photographs.npy'
    try:
        with open(path, 'rb') as file:
            np.lib.format.read_magic(file)
            shape = np.lib.format.read_array_header_1_0(file)[0]
        return int(shape[3])
    except (OSError, ValueError, IndexError, EOFError) as error:
        raise UserError(f'{path} is missing or damaged ({error}): the run read into it') from error
