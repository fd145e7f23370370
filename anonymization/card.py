"""What the institution says of a release: licence, name, contact and the like, from a YAML file.

The fields go into manifest.json as `card`, so that README.md and croissant.json follow from the
release itself. What was not given is None there, and stands in [brackets] on the pages.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.errors import UserError, listing

Card = dict[str, str | None]
_MAX_LINE, _MAX_CITATION = 200, 4000
_SHORTEST_ID = 5
_LICENSE = re.compile(r'[a-z0-9][a-z0-9.-]{1,60}')
_ADDRESS = re.compile(r'https?://[\w.-]+(:\d+)?(/[\w./~%?=&#:+-]*)?', re.ASCII)
_VERSION = re.compile(r'(0|[1-9]\d{0,5})(\.(0|[1-9]\d{0,5})){2}', re.ASCII)
_DATE = re.compile(r'\d{4}-\d\d-\d\d', re.ASCII)


class CardField(NamedTuple):
    """Which texts a field takes, in code and in words, and what stands where none was given."""

    takes: Callable[[str], bool]
    words: str
    otherwise: str


def is_address(text: str) -> bool:
    """Whether `text` is a web address."""
    return len(text) <= _MAX_LINE and _ADDRESS.fullmatch(text) is not None


def _line(text: str) -> bool:
    return 0 < len(text) <= _MAX_LINE and text.isprintable() and text == text.strip()


def _citation(text: str) -> bool:
    lines = text.split('\n')
    return (
        len(text) <= _MAX_CITATION
        and all(line.isprintable() for line in lines)
        and bool(lines[0].strip())
        and bool(lines[-1].strip())
    )


def _license(text: str) -> bool:
    return _LICENSE.fullmatch(text) is not None or is_address(text)


def _date(text: str) -> bool:
    try:
        return _DATE.fullmatch(text) is not None and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


FIELDS: dict[str, CardField] = {
    'pretty_name': CardField(
        _line, f'a line of at most {_MAX_LINE} characters', '[name of the data set]'
    ),
    'license': CardField(
        _license, 'an identifier such as cc-by-4.0, or a web address', '[licence]'
    ),
    'creator': CardField(_line, f'a line of at most {_MAX_LINE} characters', '[institution]'),
    'contact': CardField(
        _line, f'a line of at most {_MAX_LINE} characters', '[contact, and how to ask for removal]'
    ),
    'url': CardField(is_address, 'a web address', '[web address of the data set]'),
    'citation': CardField(
        _citation, f'text of at most {_MAX_CITATION} characters', '[how to cite this data set]'
    ),
    'date_published': CardField(_date, 'a date such as 2026-01-31', '[date of publication]'),
    'version': CardField(
        lambda text: _VERSION.fullmatch(text) is not None, 'three numbers such as 1.0.0', '1.0.0'
    ),
}


def is_card(value: object) -> bool:
    """Whether `value` is a card as a manifest holds it: all fields in order, each None or good."""
    return (
        isinstance(value, dict)
        and list(value) == list(FIELDS)
        and all(
            text is None or (isinstance(text, str) and FIELDS[name].takes(text))
            for name, text in value.items()
        )
    )


def read_card(path: str | Path | None) -> Card:
    """The institution's fields from a YAML file; None for those it does not name.

    All of them None without a file. UserError lists every field that is unknown or holds what it
    should not.
    """
    card: Card = dict.fromkeys(FIELDS)
    if path is None:
        return card
    faults = []
    for name, value in _read_yaml(Path(path)).items():
        if name not in FIELDS:
            faults.append(f'{name}: no such field (there are {", ".join(FIELDS)})')
            continue
        text = value.rstrip('\n') if isinstance(value, str) else None
        if text is None or not FIELDS[name].takes(text):
            faults.append(f'{name}: {json.dumps(value)[:80]} is not {FIELDS[name].words}')
        card[name] = text
    if faults:
        raise UserError(listing(f'`card` {path}: {len(faults)} fields cannot be used', faults))
    return card


def _read_yaml(path: Path) -> dict[Any, Any]:
    fields = f'write one line "field: text" for each of {", ".join(FIELDS)}'
    try:
        # The loader that takes every value for text: 1.0 is no number, 2026-01-31 no date.
        value = yaml.load(path.read_text(encoding='utf-8'), Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'`card` {path} cannot be read as YAML ({reason}); {fields}') from error
    if not isinstance(value, dict):
        raise UserError(f'`card` {path} holds no fields; {fields}')
    return value


def named_in(card: Card, ids: Iterable[str], patients: Iterable[str] | None) -> list[str]:
    """Photographs and patients that the card names as words of their own, sorted.

    Only names of five characters and more, since shorter ones may well be years or volumes.
    """
    text = ' '.join(value for value in card.values() if value is not None)
    words = {*re.findall(r'\w+', text), *re.findall(r'[\w.-]*\w', text)}
    return sorted(
        name for name in {*ids, *(patients or ())} if len(name) >= _SHORTEST_ID and name in words
    )


def check_names(card: Card, ids: Iterable[str], patients: Iterable[str] | None) -> None:
    """UserError for a card that names photographs or patients."""
    if named := named_in(card, ids, patients):
        raise UserError(
            listing(
                '`card` names photographs or patients, and is for everyone to read; take them out',
                named,
            )
        )


def filled(card: Card) -> dict[str, str]:
    """The fields as pages show them: in [brackets] what is not given, but the version 1.0.0."""
    return {
        name: text if (text := card[name]) is not None else field.otherwise
        for name, field in FIELDS.items()
    }
