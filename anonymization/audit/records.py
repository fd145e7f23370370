"""The private records of a run, as the audit reads them.

Own code for people: photographs are hashed and grouped by patient and pixels here, and nothing of
this is shared with the code that made the run.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from anonymization.audit.files import Fault, read_regular
from anonymization.audit.photographs import Look, look_again, read_records, stored_side
from anonymization.card import FIELDS, Card, is_card
from datasets.table import Table
from utils.errors import UserError

_COLUMNS = ('id_code', 'centers', 'count_centers', 'release_name', 'patient_id')
# manifest setting -> option of scripts/k-SALSA.py
SETTINGS = {
    'n_iters': 'n_iters_per_batch',
    'n_steps': 'num_steps',
    'n_crop': 'num_crop',
    'content_weight': 'content_weight',
    'style_weight': 'style_weight',
    'lr': 'lr',
    'style_mode': 'style_mode',
    'style_strides': 'style_strides',
    'style_ratio': 'style_ratio',
    'guide_weight': 'guide_weight',
    'latent_rank': 'latent_rank',
    'precision': 'precision',
    'sides': 'sides',
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The private records of a run and the photographs, as read for the audit.

    numbers: group of each photograph, 0 for left out. people: person of each photograph, by
    patient id and identical pixels. pictures: release name -> SHA-256 of the pixels. looks: what
    the photographs are; recorded: what the run took them for (photographs.COLUMNS).
    """

    private: Path
    record: dict[str, Any]
    facts: dict[str, Any]
    soft_labels: bool
    pictures: dict[str, str]
    groups: pd.DataFrame
    numbers: list[int]
    table: Table
    looks: list[Look]
    recorded: pd.DataFrame
    people: list[int]

    @property
    def contents(self) -> list[str]:
        """Equal for photographs of the same pixels, however their files are written."""
        return [look.content for look in self.looks]

    @property
    def options(self) -> dict[str, Any]:
        """Options of scripts/k-SALSA.py, as recorded."""
        return self.record['options']

    @property
    def k(self) -> int:
        """Fewest distinct patients in a group, as asked for."""
        return self.options['same_k']

    @property
    def card(self) -> Card:
        """What the institution says of the release; all None where the record holds no card."""
        card = self.facts['card']
        return card if is_card(card) else dict.fromkeys(FIELDS)

    @property
    def unit(self) -> str:
        """What is counted."""
        return 'images' if self.table.patients is None else 'patients'

    @property
    def members(self) -> dict[int, list[int]]:
        """Group number -> rows of its photographs, ascending."""
        found: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            if number:
                found.setdefault(number, []).append(row)
        return dict(sorted(found.items()))

    @property
    def names(self) -> dict[int, str]:
        """Group number -> release name."""
        return {
            number: self.groups['release_name'].iloc[rows[0]]
            for number, rows in self.members.items()
        }


def read_run(private: Path, table: Table) -> Run:
    """Reads the records in `private` and hashes the photographs of `table`.

    UserError when a record is missing or cannot be read; what they say is judged elsewhere.
    """
    record = _json(private / 'options.json')
    facts, pictures = _json(private / 'facts.json'), _json(private / 'pictures.json')
    groups = _read_groups(private / 'groups.csv', len(table))
    recorded, side = read_records(private, len(table)), stored_side(private)
    try:
        pixels = {name: str(entry['pixels']) for name, entry in pictures.items()}
        # Looked up here, so that a record without them is an error in the input.
        [record['options'][name] for name in ('same_k', 'policy', 'clustering', 'strata')]
        [record['options'][name] for name in (*SETTINGS.values(), 'epsilon', 'delta', 'clip')]
        [record[name] for name in ('seed', 'inputs')]
        [
            facts['facts'][name]
            for name in ('networks', 'versions', 'card', 'image_size', 'png_encoder', 'noise')
        ]
        soft_labels = bool(facts['soft_labels'])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'the records in {private} lack {error}; were they written by this '
            'version of scripts/k-SALSA.py?'
        ) from error
    looks = look_again(table, side, record['options']['sides'])
    return Run(
        private,
        record,
        facts['facts'],
        soft_labels,
        pixels,
        groups,
        groups['centers'].tolist(),
        table,
        looks,
        recorded,
        people_of(table.patients, [look.content for look in looks]),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path))
        if not isinstance(value, dict):
            raise Fault('holds no JSON object')
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, Fault) else 'is damaged'
        raise UserError(
            f'{path} {reason}; without it the release cannot be derived again'
        ) from error
    return value


def _read_groups(path: Path, n: int) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.BytesIO(read_regular(path)), dtype=str, keep_default_na=False)
        for name in ('centers', 'count_centers'):
            table[name] = table[name].astype(int)
        table[list(_COLUMNS)]
    except Fault as error:
        raise UserError(f'{path} {error}; it says who is in which group') from error
    except (KeyError, ValueError, OverflowError) as error:
        raise UserError(f'{path} is not a group table of this tool: {error}') from error
    numbers = set(table['centers']) - {0}
    if len(table) != n or not numbers or numbers != set(range(1, len(numbers) + 1)):
        raise UserError(
            f'{path} does not hold one row for each of {n} photographs, in groups '
            'numbered 1, 2, ... (0: left out)'
        )
    return table


def people_of(patients: Sequence[str] | None, contents: Sequence[str]) -> list[int]:
    """Person of each photograph: one patient id or one picture makes one person."""
    n = len(contents)
    keys = [('picture', d) for d in contents] + [('patient', p) for p in patients or []]
    number = {key: n + i for i, key in enumerate(dict.fromkeys(keys))}
    rows = list(range(n)) * (2 if patients else 1)
    columns = [number[key] for key in keys]
    links = coo_matrix(([1] * len(rows), (rows, columns)), shape=(n + len(number),) * 2)
    return connected_components(links, directed=False)[1][:n].tolist()
