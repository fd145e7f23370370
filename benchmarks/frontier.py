"""What a release tells a grader, and what it tells an attacker: losses side by side on phantoms.

    python benchmarks/frontier.py --out_dir=runs/frontier

Draws phantoms, inverts and groups those of the members once, and makes the groups' pictures with
every row's losses. A row says how a probe (lite1) that was trained on other people's photographs
reads the groups' shares of referable disease, what the projection attack finds out on the maker's
own features and on lite1 (membership of people by one photograph each, own group at rank 1), and
how much power the pictures have at high frequencies. The second table says what graders learn from
the row's pictures alone. Photographs and samples of the generator are the attacks' controls.
Rows are kept in --out_dir; the same command goes on where it stopped. frontier.md and sheet.png
(members, then the rows) are written anew.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import argparse
import functools
import json
import logging
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8

from anonymization.grouping import assign_groups
from anonymization.optimize import PRECISIONS
from benchmarks.appraisal import MAKER, NETWORKS, Appraiser, Photographs, described, pictures_of
from benchmarks.machine import describe
from benchmarks.releases import APART, BATCH, ROWS, WEIGHTS, Grouping, release
from datasets.phantoms.dataset import make_dataset
from datasets.table import read_table
from models.features.style import FILTERS
from models.psp import PSP, FrozenPSP, invert, load_psp
from utils.cli import add_common, nonnegative_int, parser_of, positive_int, resolve_device, run
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import atomic_path, sha256_bytes, write_json, write_text
from utils.logs import setup_logging
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

_SINGLE = 200  # photographs in the row without groups
_SHEET_GROUPS = 8


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='results and caches')
    p.add_argument(
        '--checkpoint',
        type=Path,
        default=WEIGHTS / 'restyle.pt',
        metavar='FILE',
        help='ReStyle-pSp checkpoint',
    )
    p.add_argument(
        '--n_patients',
        type=positive_int,
        default=500,
        metavar='N',
        help='members, two photographs each; as many others are drawn',
    )
    p.add_argument(
        '--n_groups',
        type=positive_int,
        metavar='N',
        help='make the pictures of N groups drawn by chance (default: of all)',
    )
    p.add_argument(
        '--skip_groups',
        type=nonnegative_int,
        default=0,
        metavar='N',
        help='leave out the N groups that --n_groups=N draws: those that settings were chosen on',
    )
    p.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='NAME', help='(default: all)')
    _add_run(p)
    p.add_argument(
        '--cnn',
        metavar='YAML',
        help='a network of this configuration of classification/configs (small128.yaml), trained '
        "on the others' photographs, reads the releases too; give it from the first row on",
    )
    p.add_argument(
        '--n_iters_per_batch',
        type=positive_int,
        default=5,
        metavar='N',
        help='refinements by the encoder',
    )
    p.add_argument(
        '--mirror_left', action='store_true', help='mirror left eyes, so that optic discs align'
    )
    p.add_argument('--precision', choices=PRECISIONS, default='bf16', help='of the optimisation')
    return add_common(p)


def _add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        '--run',
        type=Path,
        metavar='DIR',
        help='measure this finished run of scripts/k-SALSA.py on phantoms, and those --rows that '
        'are given, of its members, latents and groups',
    )
    p.add_argument(
        '--others',
        type=Path,
        metavar='DIR',
        help="other people's photographs and labels.csv, prepared as those of --run were "
        '(default: drawn)',
    )


def photographs(
    opts: argparse.Namespace, role: str, seed: int, side: int, device: torch.device
) -> Photographs:
    """Draws people and computes their features, once."""
    folder = opts.out_dir / role
    if not (folder / 'labels.csv').exists():
        make_dataset(folder, n_patients=opts.n_patients, size=side, seed=seed)
    table = read_table(folder / 'labels.csv', require_label=True)
    return described(table, opts.out_dir / role, device, mirror_left=opts.mirror_left)


def marked(name: str, folder: Path) -> str:
    """A name for what is kept of a folder elsewhere, so that another folder's is not taken."""
    return f'{name}_{sha256_bytes(str(folder.resolve()).encode())[:8]}'


class FinishedRun(NamedTuple):
    """Members and their latents [n, L, D], rows of each group, and pictures [G, 3, S, S]."""

    members: Photographs
    ws: Float[torch.Tensor, 'n L D']
    groups: list[Int[np.ndarray, ' _']]
    pictures: UInt8[np.ndarray, 'G 3 S S']

    @property
    def k(self) -> int:
        """Photographs in the smallest group."""
        return min(map(len, self.groups))


def finished_run(folder: Path, cache: Path, device: torch.device) -> FinishedRun:
    """A run of the main job on phantoms; UserError when its groups are of another table."""
    options = json.loads((folder / 'private/options.json').read_text(encoding='utf-8'))['options']
    table = read_table(Path(options['df']), Path(options['data_path']), require_label=True)
    frame = pd.read_csv(folder / 'private/groups.csv', dtype={'id_code': str})
    if list(frame.id_code) != table.ids:
        raise UserError(f'--run {folder}: its group table is not of {options["df"]}')
    names = sorted(p.stem for p in (folder / 'release/images').iterdir())
    groups = [np.flatnonzero(frame.release_name == name) for name in names]
    mirrored = options.get('sides') == 'mirror'
    members = described(table, cache / marked('run', folder), device, mirror_left=mirrored)
    ws = torch.from_numpy(np.load(folder / 'private/latents.npy'))
    pictures = pictures_of([folder / f'release/images/{n}.png' for n in names])
    return FinishedRun(members, ws, groups, pictures)


def latents(
    opts: argparse.Namespace, members: Photographs, psp: PSP, device: torch.device
) -> Float[torch.Tensor, 'n L D']:
    """Latents [n, L, D] of the members, found once."""
    path = opts.out_dir / 'latents.npy'
    if not path.exists():
        frozen = FrozenPSP(psp.to(device))
        found = [
            invert(frozen, from_uint8(part).to(device), n_iters=opts.n_iters_per_batch).ws.cpu()
            for part in torch.from_numpy(members.pictures).split(BATCH)
        ]
        with atomic_path(path) as temp, open(temp, 'wb') as file:
            np.save(file, torch.cat(found).numpy())
    return torch.from_numpy(np.load(path))


def groups_of(
    k: int,
    members: Photographs,
    ws: Float[torch.Tensor, 'n L D'],
    n_groups: int | None,
    seed: int,
    device: torch.device,
    how: Grouping = APART,
) -> list[Int[np.ndarray, ' _']]:
    """Member rows of each group, as the main job groups them; n_groups of them by chance.

    k = 1: photographs by themselves, at most _SINGLE of them.
    """
    if k == 1:
        order = numpy_generator(seed, 'groups', k).permutation(len(ws))
        return [np.array([i]) for i in order[: min(n_groups or _SINGLE, _SINGLE)]]
    _, people = np.unique(members.people, return_inverse=True)
    numbers = np.asarray(
        assign_groups(
            ws.numpy().reshape(len(ws), -1),
            k,
            patients=list(people),
            strata=_grades_of_people(members) if how.by_grade else None,
            method=how.clustering,
            policy=how.policy,
            seed=seed,
            device=device,
        ).numbers
    )
    found = [np.flatnonzero(numbers == c) for c in range(1, numbers.max() + 1)]
    order = numpy_generator(seed, 'groups', k).permutation(len(found))
    return [found[i] for i in order[:n_groups]]


def _grades_of_people(members: Photographs) -> list[int]:
    """The worst grade of the person on each photograph, so that no stratum divides a person."""
    worst: dict[str, int] = {}
    for person, grade in zip(members.people.tolist(), members.grades.tolist()):
        worst[person] = max(grade, worst.get(person, 0))
    return [worst[person] for person in members.people.tolist()]


def markdown(results: dict[str, dict]) -> str:
    """What all rows tell an attacker, and what they tell a grader."""
    leaks = _table(
        [
            'release',
            'k',
            'groups',
            'correlation of a photograph-trained probe with the shares',
            *(f'membership, {n}' for n in NETWORKS),
            'own group rank 1',
            'high frequencies',
            'vessel length',
            f'Frechet distance, {MAKER}, x 1000',
            'seconds a group',
        ],
        [
            [
                name,
                str(r['k']),
                str(r['n_groups']),
                _interval(r['reading']['correlation']),
                *(f'{r[n]["auc"]:.2f}' for n in NETWORKS),
                f'{r[MAKER]["rank_1"]:.2f}',
                f'{r["high_frequencies"]["value"]:.2f}',
                f'{r["vessels"]["length"]["value"]:.2f}' if 'vessels' in r else '-',
                f'{1000 * r["frechet"]:.0f}' if 'frechet' in r else '-',
                f'{r["seconds"]:.1f}' if 'seconds' in r else '-',
            ]
            for name, r in results.items()
        ],
    )
    learners = (*NETWORKS, FILTERS)
    lessons = _table(
        [
            'trained on',
            *(f'{n} probe, AUC' for n in learners),
            'score of a photograph-trained CNN against the shares',
            *(f'nearest picture, {n}' for n in NETWORKS),
        ],
        [
            [
                name,
                *('-' if r['lessons'][n] is None else _interval(r['lessons'][n]) for n in learners),
                _interval(r['cnn']['correlation']) if 'cnn' in r else '-',
                *(f'{r[n]["nearest"]:.2f}' for n in NETWORKS),
            ]
            for name, r in results.items()
        ],
    )
    return f'{leaks}\n{lessons}'


def _interval(value: dict[str, float]) -> str:
    return f'{value["value"]:.2f} ({value["low"]:.2f} to {value["high"]:.2f})'


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ['---'] * len(heads), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def write_sheet(
    path: Path,
    made: list[UInt8[np.ndarray, 'G 3 S S']],
    members: Photographs,
    groups: list[Int[np.ndarray, ' _']],
) -> None:
    """Eight groups: five members, then every row's picture."""
    cells = [
        torch.from_numpy(c)
        for i, g in enumerate(groups[:_SHEET_GROUPS])
        for c in [*members.pictures[g[:5]], *(pictures[i] for pictures in made)]
    ]
    save_png(grid(from_uint8(torch.stack(cells)), 5 + len(made)), path)


def slug(name: str) -> str:
    return ''.join(c if c.isalnum() else '_' for c in name)


def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    device = resolve_device(opts.device)
    psp = load_psp(opts.checkpoint).eval()
    if psp.input_size < 64:
        raise UserError(f'--checkpoint: an encoder of {psp.input_size} px; at least 64 are needed')
    opts.out_dir.mkdir(parents=True, exist_ok=True)
    # Seed 1 drew the photographs that the embedded weights were trained on, 2 those of the demo.
    if opts.others is None:
        others = photographs(opts, 'others', opts.seed + 202, psp.input_size, device)
    else:
        table = read_table(opts.others / 'labels.csv', opts.others, require_label=True)
        cache = opts.out_dir / marked('others', opts.others)
        others = described(table, cache, device, mirror_left=opts.mirror_left)
    if opts.run is None:
        finished = None
        members = photographs(opts, 'members', opts.seed + 101, psp.input_size, device)
    else:
        finished = finished_run(opts.run, opts.out_dir, device)
        members = finished.members
    names = wanted_rows(opts, finished)
    appraiser = Appraiser(
        members,
        others,
        seed=opts.seed,
        device=device,
        cnn=opts.cnn,
        checkpoint=opts.out_dir / 'cnn.pt',
    )
    compare(names, opts, appraiser, finished, psp, device)
    return 0


def wanted_rows(opts: argparse.Namespace, finished: FinishedRun | None) -> list[str]:
    """The names of the rows to make; UserError for rows that the groups of --run cannot have."""
    if finished is None:
        return opts.rows or list(ROWS)
    for name in opts.rows or []:
        if ROWS[name].k not in (1, finished.k):
            raise UserError(
                f'--rows {name!r} is of groups of {ROWS[name].k}, the groups of --run {opts.run} '
                f'are of {finished.k}; leave it out'
            )
    return opts.rows or []


def compare(
    names: list[str],
    opts: argparse.Namespace,
    appraiser: Appraiser,
    finished: FinishedRun | None,
    psp: PSP,
    device: torch.device,
) -> None:
    """Computes the rows that are missing, and writes tables and sheet of all that are kept."""
    members, results, made = appraiser.members, {}, []
    ws = latents(opts, members, psp, device) if finished is None else finished.ws
    main_k = 5 if finished is None else finished.k

    @functools.cache
    def groups(k: int, how: Grouping = APART) -> list[Int[np.ndarray, ' _']]:
        if finished is not None and k == finished.k:
            return finished.groups
        found = groups_of(k, members, ws, opts.n_groups, opts.seed, device, how)
        return found[opts.skip_groups :]

    if finished is not None:
        found = {'k': finished.k, **appraiser.measure(finished.pictures, finished.groups)}
        write_json(opts.out_dir / f'{marked("run", opts.run)}.json', found)
        results[opts.run.name] = found
        made.append(finished.pictures)
    for name, row in ROWS.items():
        path = row_file(opts, name)
        if name in names and not path.exists():
            parts, begin = groups(row.k, row.grouping), time.process_time()
            engine = {'seed': opts.seed, 'device': device, 'precision': opts.precision}
            pictures = release(row, parts, members, ws, psp, **engine)
            seconds = (time.process_time() - begin) / len(parts)
            with atomic_path(path.with_suffix('.npy')) as temp, open(temp, 'wb') as file:
                np.save(file, pictures)
            found = appraiser.measure(pictures, parts)
            write_json(path, {'k': row.k, 'seconds': seconds, **found})
        if path.exists():
            results[name] = json.loads(path.read_text(encoding='utf-8'))
            log.info('\n%s', markdown({name: results[name]}))
            if row.k == main_k and row.grouping == APART:
                made.append(np.load(path.with_suffix('.npy')))
    write_text(opts.out_dir / 'frontier.md', markdown(results))
    write_sheet(opts.out_dir / 'sheet.png', made, members, groups(main_k))
    print(f'{describe(device)}\n\n{markdown(results)}')


def row_file(opts: argparse.Namespace, name: str) -> Path:
    """Where a row is kept; that of a --run's groups by itself."""
    kept = slug(name) if opts.run is None else marked(slug(name), opts.run)
    return opts.out_dir / f'{kept}.json'


if __name__ == '__main__':
    run(main)
