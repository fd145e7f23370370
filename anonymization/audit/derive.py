"""What a release must say, worked out anew from the group table, the photographs and the record.

Own code for people, counts, grades, l-diversity and t-closeness: none is shared with grouping and
writing, so that a fault there is not repeated here. Grades and patients are those of the table of
photographs, and identical photographs are found in the files; the run's copies are compared.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import Fault, read_regular
from anonymization.audit.noise import derived_noise, stored_key
from anonymization.audit.records import SETTINGS, Run
from anonymization.card import is_card, named_in
from anonymization.release import FORMAT, release_names
from anonymization.starts import KEY
from utils.io import sha256_file

RECORDS = 'the records of the run are whole and belong to these photographs'
TWICE = 'no patient is counted twice in a group'
GRADES = 'grades within groups'
_SEALED = ('photographs.csv', 'groups.csv', 'pictures.json', 'group_latents.npy', 'facts.json')
_N_GRADES = 5
# Column of photographs.csv -> what it means when it is not what the second look gives.
_PHOTOGRAPHS = {
    'file': 'photographs are not those of the run',
    'content': 'photographs do not have the pixels that the run compared',
    'eye': 'photographs were taken for an eye of the other side',
    'stored': 'photographs were not given to the networks as the settings say',
}
_STRATA = {
    'eye': 'eyes',
    'label': 'labels',
    'referable': 'referable',
    'visit': 'visits',
    'split': 'splits',
}
_REFERABLE = (2, 3, 4)


# -- checks of the records and of the groups ------------------------------------------------


def check_records(run: Run) -> Check:
    """Checksums, photographs and weight files of the run record; the group table's own columns."""
    found = Findings(RECORDS)
    for name in (*_SEALED, *([KEY] if run.options['epsilon'] is not None else [])):
        seal = run.private / f'{name}.sha256'
        try:
            wanted = read_regular(seal)[:64].decode('latin-1')
        except Fault:
            found.add(f'private/{name} has no readable checksum beside it')
            continue
        file = run.private / name
        if not file.is_file() or sha256_file(file) != wanted:
            found.add(f'private/{name} is not the file that the run wrote')
    for column, words in _PHOTOGRAPHS.items():
        own = [getattr(look, column) for look in run.looks]
        if odd := [i for i, a, b in zip(run.table.ids, own, run.recorded[column]) if a != b]:
            found.add(f'{len(odd)} {words}', odd)
    table, groups = run.table, run.groups
    if groups['id_code'].tolist() != list(table.ids):
        found.add(
            'the group table does not hold the ids of the source table',
            set(groups['id_code']) ^ set(table.ids),
        )
    elif table.patients is not None and groups['patient_id'].tolist() != list(table.patients):
        found.add(
            'patients of the group table are not those of the source table',
            [i for i, a, b in zip(table.ids, groups['patient_id'], table.patients) if a != b],
        )
    if ('diagnosis' in groups) != (table.labels is not None) or (
        table.labels is not None and groups['diagnosis'].tolist() != [str(v) for v in table.labels]
    ):
        found.add('grades of the group table are not those of the source table')
    return found.check(f'{len(table)} photographs, {len(set(run.contents))} of them different')


def check_groups(run: Run) -> list[Check]:
    """At least k distinct people in each group, disjoint groups, strata, names."""
    found = Findings(
        f'every group has at least k = {run.k} distinct {run.unit}, groups are disjoint'
    )
    twice, smallest, members = Findings(TWICE), None, run.members
    if not isinstance(run.k, int) or run.k < 2:
        found.add(f'k is {run.k}, below 2')
    for number, rows in members.items():
        part = run.groups.iloc[rows]
        ids = part['id_code'].tolist()
        distinct = len({run.people[r] for r in rows})
        smallest = distinct if smallest is None else min(smallest, distinct)
        if distinct < run.k:
            found.add(f'group {number} has {distinct} distinct {run.unit}', ids)
        if (part['count_centers'] != len(part)).any():
            found.add(f'group {number} has {len(part)} rows and says otherwise')
        if part['release_name'].nunique() != 1:
            found.add(f'group {number} has several release names')
        if run.options['policy'] == 'distinct' and distinct < len(rows):
            twice.add(f'group {number}', ids)
    kept = run.groups[run.groups['centers'] != 0]
    if double := sorted(set(kept['id_code'][kept['id_code'].duplicated()])):
        found.add(f'{len(double)} photographs are in more than one group', double)
    left_out = run.groups[run.groups['centers'] == 0]
    if (left_out['release_name'] != '').any() or (left_out['count_centers'] != 0).any():
        found.add('photographs that were left out have a group')
    _check_people(run, found)
    _check_strata(run, found)
    if run.names != _derived_names(run):
        found.add('release names do not follow from the seed and the group table')
    return [
        found.check(f'{len(members)} groups, smallest {smallest}'),
        twice.check(f'policy {run.options["policy"]}'),
    ]


def _check_people(run: Run, found: Findings) -> None:
    """Identical photographs, and under 'together' people, stand in one group only."""
    for label, keys, applies in (
        ('identical photographs', run.contents, True),
        ('patients', run.people, run.options['policy'] == 'together'),
    ):
        groups: dict[Any, set[int]] = {}
        for key, number in zip(keys, run.numbers):
            if number:
                groups.setdefault(key, set()).add(number)
        if applies and (many := sum(len(g) > 1 for g in groups.values())):
            found.add(
                f'{many} {label} are in more than one group',
                [run.table.ids[i] for i, key in enumerate(keys) if len(groups.get(key, ())) > 1],
            )


def _check_strata(run: Run, found: Findings) -> None:
    for name in run.options['strata']:
        values = getattr(run.table, 'labels' if name == 'referable' else _STRATA[name])
        if name == 'referable' and values is not None:
            values = [int(grade) in _REFERABLE for grade in values]
        mixed = [
            number
            for number, rows in run.members.items()
            if values is None or len({values[r] for r in rows}) != 1
        ]
        if mixed:
            found.add(f'{len(mixed)} groups cross the strata of {name}')
    if run.options['sides'] == 'apart':
        eyes = [look.eye for look in run.looks]
        mixed = [n for n, rows in run.members.items() if len({eyes[r] for r in rows}) != 1]
        if mixed:
            found.add(f'{len(mixed)} groups hold eyes of both sides')


def _derived_names(run: Run) -> dict[int, str]:
    secret = '\n'.join(f'{i} {c}' for i, c in zip(run.groups['id_code'], run.numbers)).encode()
    if run.options['epsilon'] is not None:
        secret = stored_key(run) + secret
    names = release_names(len(run.members), secret, run.record['seed'])
    return dict(zip(run.members, names))


# -- what follows from them -----------------------------------------------------------------


def grade_counts(run: Run) -> dict[int, tuple[int, ...]] | None:
    """Group number -> how many photographs have grade 0, 1, ... 4; None without grades."""
    if run.table.labels is None:
        return None
    counts = {}
    for number, rows in run.members.items():
        count = Counter(int(run.table.labels[r]) for r in rows)
        counts[number] = tuple(count.get(g, 0) for g in range(_N_GRADES))
    return counts


def _majority(counts: tuple[int, ...]) -> int:
    return next(g for g, c in enumerate(counts) if c == max(counts))


def diversity(counts: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """l-diversity and t-closeness in fractions, rounded to six decimals."""
    everyone = [sum(column) for column in zip(*counts)]
    total, n = sum(everyone), len(counts)
    distances, kinds = [], []
    for own in counts:
        size, below, gap = sum(own), Fraction(0), Fraction(0)
        for mine, all_of_them in zip(own[:-1], everyone[:-1]):
            below += Fraction(mine, size) - Fraction(all_of_them, total)
            gap += abs(below)
        distances.append(gap / (_N_GRADES - 1))
        kinds.append(_N_GRADES - own.count(0))
    return {
        'homogeneous': round(float(Fraction(kinds.count(1), n)), 6),
        'l_min': min(kinds),
        'l_mean': round(float(Fraction(sum(kinds), n)), 6),
        't_max': round(float(max(distances)), 6),
        't_mean': round(float(sum(distances) / n), 6),
    }


def labels_text(run: Run) -> str:
    """labels.csv as it must be, byte for byte."""
    return _table_text(run, 'image', '', '')


def metadata_text(run: Run) -> str:
    """metadata.csv as it must be, byte for byte."""
    return _table_text(run, 'file_name', 'images/', '.png')


def _table_text(run: Run, first: str, before: str, after: str) -> str:
    counts = grade_counts(run)
    header = [first]
    if counts is not None:
        header += ['label'] + [f'p{g}' for g in range(_N_GRADES)] * run.soft_labels
    lines = [','.join(header)]
    for name, number in sorted((name, number) for number, name in run.names.items()):
        cells = [f'{before}{name}{after}']
        if counts is not None:
            own = counts[number]
            cells.append(str(_majority(own)))
            if run.soft_labels:
                cells += [repr(round(c / sum(own), 6)) for c in own]
        lines.append(','.join(cells))
    return '\n'.join(lines) + '\n'


def manifest_without_files(run: Run) -> dict[str, Any]:
    """The manifest as it must be, but for the hashes of the files."""
    counts, sizes, people = grade_counts(run), [], []
    for rows in run.members.values():
        sizes.append(len(rows))
        people.append(len({run.people[r] for r in rows}))
    grades = None if counts is None else _histogram([_majority(c) for c in counts.values()])
    return {
        'format': FORMAT,
        'k': run.k,
        'unit': run.unit,
        'policy': run.options['policy'],
        'clustering': run.options['clustering'],
        'strata': [_STRATA[s] for s in run.options['strata']],
        'n_suppressed': run.numbers.count(0),
        'image_size': run.facts['image_size'],
        'settings': {name: run.options[option] for name, option in SETTINGS.items()},
        'noise': derived_noise(run),
        'networks': run.facts['networks'],
        'versions': run.facts['versions'],
        'card': run.card,
        'png_encoder': run.facts['png_encoder'],
        'n_images': len(run.members),
        'images_per_group': _histogram(sizes),
        'patients_per_group': _histogram(people),
        'grades': grades,
        'grade_diversity': None if counts is None else diversity(list(counts.values())),
    }


def _histogram(values: Sequence[int]) -> dict[str, int]:
    return {str(v): values.count(v) for v in sorted(set(values))}


def check_networks(run: Run, found: Findings) -> None:
    """The networks named in the manifest are the weight files of the run record."""
    inputs, networks = run.record['inputs'], run.facts['networks']
    style = inputs.get('style network')
    if style is None:  # no file: the built-in filters, or none where the loss is off
        style = 'filters' if run.options['style_weights'] == 'filters' else 'none'
    wanted = {
        'generator and encoder': inputs.get('checkpoint'),
        'content': inputs.get('content network'),
        'style': style,
        'guide': inputs.get('guide', 'none'),
    }
    if (
        not isinstance(networks, dict)
        or list(networks) != list(wanted)
        or any(str(networks[role]).split(' ')[-1] != value for role, value in wanted.items())
    ):
        found.add('networks are not the weight files of the run record')


def check_card(run: Run, found: Findings) -> None:
    """The institution's fields have their form, and name no photograph and no patient."""
    if not is_card(run.facts['card']):
        found.add('the card in the run record has other fields than it should')
    if named := named_in(run.card, run.table.ids, run.table.patients):
        found.add(f'the card names {len(named)} photographs or patients', named)


def check_grades(run: Run) -> tuple[Check, dict[str, Any]]:
    """Attribute disclosure in words and numbers; never fails."""
    counts = grade_counts(run)
    if not counts:
        return Check(GRADES, True, 'no grades were given'), {}
    found = diversity(list(counts.values()))
    one = sum(c.count(0) == _N_GRADES - 1 for c in counts.values())
    words = (
        f'{one} of {len(counts)} groups hold one single grade: whoever knows that a person is '
        'in such a group knows the grade. '
        if one
        else ''
    )
    most = max(_N_GRADES - c.count(0) for c in counts.values())
    return Check(
        GRADES,
        True,
        (
            f'{words}l-diversity {found["l_min"]} to {most} (mean {found["l_mean"]:.1f}), '
            f't-closeness at most {found["t_max"]:.2f} (mean {found["t_mean"]:.2f})'
        ),
    ), found
