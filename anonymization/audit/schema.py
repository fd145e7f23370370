"""What a recipient can check without private/: the form of manifest and labels, and their sums."""

import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pandas as pd

from anonymization.audit.checks import Findings
from anonymization.audit.files import Fault
from anonymization.audit.noise import noise_suffices
from anonymization.card import is_card
from anonymization.release import FORMAT

NAME = r'[bcdfghjkmnpqrstvwxz]{8}'
_N_GRADES = 5
_LEAST = 1e-300  # of what is above 0
_HASH = re.compile(r'[0-9a-f]{64}')
_NETWORK = re.compile(r'[\w.-]{1,40}( [0-9a-f]{64})?', re.ASCII)
_WORD = re.compile(r'[a-z_]{1,20}')
_VERSION = re.compile(r'[\w.+-]{1,60}', re.ASCII)
_ENCODER = re.compile(r'pillow [\w.+-]{1,40}, zlib(-ng)? [\w.+-]{1,40}', re.ASCII)


def _count(low: int = 0, high: float = float('inf')) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _number(low: float = 0, high: float = float('inf')) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and low <= v <= high


def _text(pattern: re.Pattern[str], empty: bool = False) -> Callable[[Any], bool]:
    return lambda v: (
        (empty and v is None) or (isinstance(v, str) and pattern.fullmatch(v) is not None)
    )


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in words


def _strata(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(_one_of('eyes', 'labels', 'referable', 'visits', 'splits')(v) for v in value)
        and len(set(value)) == len(value)
    )


def _histogram(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(re.fullmatch(r'0|[1-9][0-9]{0,8}', k) and _count(1)(v) for k, v in value.items())
        and list(value) == sorted(value, key=int)
    )


def _fields(**rules: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, dict)
        and list(v) == list(rules)
        and all(rule(v[name]) for name, rule in rules.items())
    )


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or rule(v)


def _number_or_auto(value: Any) -> bool:
    return value == 'auto' or _number()(value)


def _strides(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(_count(1, 64)(v) for v in value)


def _versions(value: Any) -> bool:
    known = {'python', 'torch', 'torchvision', 'numpy', 'pillow', 'k-salsa', 'cuda', 'commit'}
    return (
        isinstance(value, dict)
        and value.keys() == known
        and all(_text(_VERSION, empty=True)(v) for v in value.values())
    )


def _networks(value: Any) -> bool:
    roles = ['generator and encoder', 'content', 'style', 'guide']
    return (
        isinstance(value, dict)
        and list(value) == roles
        and _text(_HASH)(value[roles[0]])
        and all(_text(_NETWORK)(value[r]) for r in roles[1:])
    )


_MANIFEST: dict[str, Callable[[Any], bool]] = {
    'format': _one_of(FORMAT),
    'k': _count(2),
    'unit': _one_of('patients', 'images'),
    'policy': _one_of('distinct', 'together'),
    'clustering': _text(_WORD),
    'strata': _strata,
    'n_suppressed': _count(),
    'image_size': _count(4, 8192),
    'settings': _fields(
        n_iters=_count(1),
        n_steps=_count(),
        n_crop=_count(1),
        content_weight=_number(),
        style_weight=_number_or_auto,
        lr=_number_or_auto,
        style_mode=_or_none(_text(_WORD)),
        style_strides=_strides,
        style_ratio=_number(),
        guide_weight=_number(),
        latent_rank=_count(),
        precision=_one_of('fp32', 'tf32', 'bf16'),
        sides=lambda v: v in ('mirror', 'apart', 'mixed'),
    ),
    'noise': _or_none(
        _fields(
            epsilon=_number(_LEAST, 500),
            delta=_number(_LEAST, 1),
            clip=_number(_LEAST),
            directions=_count(1),
            groups_per_person=_count(1),
            sigma=_number(_LEAST),
        )
    ),
    'networks': _networks,
    'versions': _versions,
    'card': is_card,
    'png_encoder': _text(_ENCODER),
    'n_images': _count(1),
    'images_per_group': _histogram,
    'patients_per_group': _histogram,
    'grades': _or_none(_histogram),
    'grade_diversity': _or_none(
        _fields(
            homogeneous=_number(0, 1),
            l_min=_count(1, _N_GRADES),
            l_mean=_number(1, _N_GRADES),
            t_max=_number(0, 1),
            t_mean=_number(0, 1),
        )
    ),
    'files': lambda v: isinstance(v, dict) and all(_text(_HASH)(h) for h in v.values()),
}


def check_manifest(manifest: dict[str, Any], found: Findings) -> bool:
    """Keys, their order, types and ranges. Returns whether sums can be looked at."""
    if manifest.get('format') != FORMAT:
        found.add(f'the format of the manifest is not {FORMAT}, the one that this version knows')
        return False
    if list(manifest) != list(_MANIFEST):
        found.add('the manifest has other fields than it should')
        return False
    wrong = [name for name, rule in _MANIFEST.items() if not rule(manifest[name])]
    if wrong:
        found.add(f'fields of the manifest hold what they should not: {", ".join(wrong)}')
    return not wrong


def check_sums(manifest: dict[str, Any], labels: pd.DataFrame, found: Findings) -> None:
    """Counts of the manifest against each other and against labels.csv."""
    for name in ('images_per_group', 'patients_per_group', 'grades'):
        if manifest[name] and sum(manifest[name].values()) != manifest['n_images']:
            found.add(f'{name} does not add up to n_images')
    if min(int(v) for v in manifest['patients_per_group']) < manifest['k']:
        found.add('a group has fewer members than k')
    people, images = (
        sum(int(v) * c for v, c in manifest[name].items())
        for name in ('patients_per_group', 'images_per_group')
    )
    if people > images or (manifest['policy'] == 'distinct' and people != images):
        found.add('images_per_group and patients_per_group do not go together')
    if not noise_suffices(manifest):
        found.add('the noise is too small for epsilon and delta')
    noise, settings = manifest['noise'], manifest['settings']
    if noise and (noise['directions'] != settings['latent_rank'] or settings['n_steps']):
        found.add('noise and settings do not go together')
    if manifest['n_images'] != len(labels):
        found.add('n_images is not the number of labels')
    grades = (
        {str(g): c for g, c in sorted(Counter(labels['label']).items())}
        if 'label' in labels
        else None
    )
    if manifest['grades'] != grades:
        found.add('grades are not those of labels.csv')
    if (manifest['grade_diversity'] is None) != (grades is None):
        found.add('grade_diversity and grades do not go together')


def read_labels(data: bytes) -> pd.DataFrame:
    """labels.csv as a table: image (text), label (int), p0 to p4 (float); Fault when malformed."""
    try:
        text = data.decode('ascii')
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise Fault('is not a table that can be read') from error
    shares = [f'p{g}' for g in range(_N_GRADES)]
    if list(table) not in (['image'], ['image', 'label'], ['image', 'label', *shares]):
        raise Fault('has other columns than image, label and p0 to p4')
    if table.empty or not all(re.fullmatch(NAME, name) for name in table['image']):
        raise Fault('has names that are not eight letters of the alphabet of names')
    if not table['image'].is_monotonic_increasing or not table['image'].is_unique:
        raise Fault('is not sorted by name, or names a picture twice')
    if 'label' in table:
        if not all(re.fullmatch('[0-4]', v) for v in table['label']):
            raise Fault('has labels other than 0 to 4')
        table['label'] = table['label'].astype(int)
    if 'p0' in table:
        if not all(re.fullmatch(r'[01]\.[0-9]{1,6}', v) for v in table[shares].to_numpy().flat):
            raise Fault('has shares that are not numbers from 0 to 1 with six decimals')
        table[shares] = table[shares].astype(float)
        values = table[shares].to_numpy()
        if (abs(values.sum(1) - 1) > 1e-5).any() or (values.argmax(1) != table['label']).any():
            raise Fault('has shares that do not add up to 1, or whose largest is not the label')
    if table.to_csv(index=False, lineterminator='\n').encode() != data:
        raise Fault('is not in the form that this tool writes')
    return table
