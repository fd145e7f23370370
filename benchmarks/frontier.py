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
import dataclasses
import json
import logging
import time

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8

from anonymization.grouping import assign_groups
from anonymization.optimize import PRECISIONS, Group, GroupOptimizer, OptimizeConfig
from benchmarks.appraisal import MAKER, NETWORKS, Appraiser, Photographs, described, pictures_of
from benchmarks.machine import describe
from datasets.phantoms.dataset import make_dataset
from datasets.table import read_table
from models.features.guide import load_guide
from models.features.pretrained import load_feature_network
from models.features.style import FILTERS
from models.psp import PSP, FrozenPSP, invert, load_psp
from models.stylegan2.sampling import seed_latents
from utils.cli import add_common, nonnegative_int, parser_of, positive_int, resolve_device, run
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png, to_uint8
from utils.io import atomic_path, sha256_bytes, write_json, write_text
from utils.logs import setup_logging
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

WEIGHTS = ROOT / 'pretrained_models/demo'
_BATCH = 10
_SINGLE = 200  # photographs in the row without groups
_SHEET_GROUPS = 8
AUTO = {'style_weight': 'auto', 'lr': 'auto', 'content_weight': 1.0}
CONTENT_ONLY = {**AUTO, 'style_weight': 0.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the size of the groups and the settings; none are baselines.

    independent: samples of the generator stand in the place of the groups' pictures. guided: the
    embedded guide is part of the content loss.
    """

    k: int = 5
    settings: dict | None = None
    independent: bool = False
    guided: bool = False


STRONG = {**AUTO, 'n_steps': 40, 'style_ratio': 3.0}  # both losses of about equal size
ROWS = {
    'photographs': Row(1),
    'samples of the generator': Row(independent=True),
    'pixel average': Row(),
    'centroid': Row(settings={**AUTO, 'n_steps': 0}),
    **{
        f'centroid, 8 leading directions{name}': Row(k, {**AUTO, 'n_steps': 0, 'latent_rank': 8})
        for name, k in {'': 5, ', k = 10': 10, ', k = 20': 20}.items()
    },
    'content and guide, 10 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 10}, guided=True),
    'content only, 40 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 40}),
    'content only, 60 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 60}),
    'content only, 100 steps': Row(settings=CONTENT_ONLY),
    'content and guide, 40 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 40}, guided=True),
    'whole picture, 60 steps': Row(settings={**AUTO, 'n_steps': 60}),
    'whole picture and guide, 40 steps (default)': Row(
        settings={**AUTO, 'n_steps': 40}, guided=True
    ),
    'whole picture, ratio 3, 40 steps': Row(settings=STRONG),
    'whole picture, ratio 3, 100 steps': Row(settings={**STRONG, 'n_steps': 100}),
    'whole picture, ratio 3, stride 8, 40 steps': Row(settings={**STRONG, 'style_strides': (8,)}),
    '4 x 4 patches at one place, ratio 3, 40 steps': Row(
        settings={**STRONG, 'style_mode': 'same_place'}
    ),
    '4 x 4 patches, best match, ratio 3, 40 steps': Row(
        settings={**STRONG, 'style_mode': 'best_match'}
    ),
    'content only, 100 steps, k = 10': Row(10, CONTENT_ONLY),
    'whole picture, 100 steps, k = 10': Row(10, AUTO),
    'whole picture and guide, 40 steps, k = 10': Row(10, {**AUTO, 'n_steps': 40}, guided=True),
    **{
        f'whole picture and guide of {weight}, {steps} steps, k = 10': Row(
            10, {**AUTO, 'n_steps': steps, 'guide_weight': weight}, guided=True
        )
        for weight, steps in ((0.1, 60), (0.1, 80), (0.2, 40), (0.2, 60))
    },
    'whole picture, ratio 3, 40 steps, k = 10': Row(10, STRONG),
}


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
    p.add_argument('--rows', nargs='+', choices=sorted(ROWS), metavar='NAME', help='(default: all)')
    _add_run(p)
    p.add_argument(
        '--cnn',
        metavar='YAML',
        help='a network of this configuration of classification/configs (small.yaml), trained '
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
        help='measure this finished run of scripts/k-SALSA.py on phantoms instead',
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


def finished_run(
    folder: Path, cache: Path, device: torch.device
) -> tuple[Photographs, list[Int[np.ndarray, ' _']], UInt8[np.ndarray, 'G 3 S S']]:
    """Members, rows of each group, and pictures of a run of the main job."""
    options = json.loads((folder / 'private/options.json').read_text(encoding='utf-8'))['options']
    table = read_table(Path(options['df']), Path(options['data_path']), require_label=True)
    frame = pd.read_csv(folder / 'private/groups.csv', dtype={'id_code': str})
    if list(frame.id_code) != table.ids:
        raise UserError(f'--run {folder}: its group table is not of {options["df"]}')
    names = sorted(p.stem for p in (folder / 'release/images').iterdir())
    groups = [np.flatnonzero(frame.release_name == name) for name in names]
    mirrored = options.get('sides') == 'mirror'
    members = described(table, cache / marked('run', folder), device, mirror_left=mirrored)
    return members, groups, pictures_of([folder / f'release/images/{n}.png' for n in names])


def latents(
    opts: argparse.Namespace, members: Photographs, psp: PSP, device: torch.device
) -> Float[torch.Tensor, 'n L D']:
    """Latents [n, L, D] of the members, found once."""
    path = opts.out_dir / 'latents.npy'
    if not path.exists():
        frozen = FrozenPSP(psp.to(device))
        found = [
            invert(frozen, from_uint8(part).to(device), n_iters=opts.n_iters_per_batch).ws.cpu()
            for part in torch.from_numpy(members.pictures).split(_BATCH)
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
            ws.numpy().reshape(len(ws), -1), k, patients=list(people), seed=seed, device=device
        ).numbers
    )
    found = [np.flatnonzero(numbers == c) for c in range(1, numbers.max() + 1)]
    order = numpy_generator(seed, 'groups', k).permutation(len(found))
    return [found[i] for i in order[:n_groups]]


def release(
    row: Row,
    groups: list[Int[np.ndarray, ' _']],
    members: Photographs,
    ws: Float[torch.Tensor, 'n L D'],
    psp: PSP,
    opts: argparse.Namespace,
    device: torch.device,
) -> UInt8[np.ndarray, 'G 3 S S']:
    """The groups' pictures, uint8 [G, 3, S, S]."""
    if row.independent:
        return samples(len(groups), psp, opts.seed, device)
    if row.settings is None:
        return np.stack([np.rint(members.pictures[g].mean(0)).astype(np.uint8) for g in groups])
    net = load_feature_network(MAKER)
    guide = None
    if row.guided:
        guide = load_guide(WEIGHTS / 'guide.pt', n_features=net.n_features, digest=net.digest)
    engine = GroupOptimizer(
        psp,
        net,
        net,
        config=OptimizeConfig(**row.settings),
        device=device,
        precision=opts.precision,
        guide=guide,
    )
    pooled = torch.from_numpy(members.features[MAKER]['pooled'])
    made = []
    for start in range(0, len(groups), _BATCH):
        batch = [
            Group(ws[g], torch.from_numpy(members.pictures[g]), pooled[g])
            for g in groups[start : start + _BATCH]
        ]
        made.append(to_uint8(engine.psp.pool(engine.run(batch).image)))
    return torch.cat(made).numpy()


@torch.no_grad()
def samples(n: int, psp: PSP, seed: int, device: torch.device) -> UInt8[np.ndarray, 'n 3 S S']:
    """n pictures of the generator that depend on nobody, uint8 [n, 3, S, S]."""
    psp = psp.to(device)
    draws = seed_latents(range(seed, seed + n), psp.decoder.style_dim).to(device)
    made = [to_uint8(psp.pool(psp.decoder(z))).cpu() for z in draws.split(_BATCH)]
    return torch.cat(made).numpy()


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
                f'{r["seconds"]:.1f}',
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
                *('-' if r['lessons'][n] is None else f'{r["lessons"][n]:.3f}' for n in learners),
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
    opts: argparse.Namespace,
    results: dict[str, dict],
    members: Photographs,
    groups: list[Int[np.ndarray, ' _']],
) -> None:
    """Eight groups of k = 5: members, then every row's picture."""
    rows = [name for name in results if ROWS[name].k == 5]
    pictures = [np.load(opts.out_dir / f'{slug(name)}.npy') for name in rows]
    cells = [
        torch.from_numpy(c)
        for i, g in enumerate(groups[:_SHEET_GROUPS])
        for c in [*members.pictures[g[:5]], *(p[i] for p in pictures)]
    ]
    save_png(grid(from_uint8(torch.stack(cells)), 5 + len(rows)), opts.out_dir / 'sheet.png')


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
        members = photographs(opts, 'members', opts.seed + 101, psp.input_size, device)
    else:
        members, groups, pictures = finished_run(opts.run, opts.out_dir, device)
    appraiser = Appraiser(
        members,
        others,
        seed=opts.seed,
        device=device,
        cnn=opts.cnn,
        checkpoint=opts.out_dir / 'cnn.pt',
    )
    if opts.run is not None:
        print(json.dumps(appraiser.measure(pictures, groups), indent=2))
        return 0
    compare(opts, appraiser, psp, device)
    return 0


def compare(opts: argparse.Namespace, appraiser: Appraiser, psp: PSP, device: torch.device) -> None:
    """Computes the rows that are missing, and writes tables and sheet."""
    members = appraiser.members
    ws, results, groups = latents(opts, members, psp, device), {}, {}
    for name, row in ROWS.items():
        path = opts.out_dir / f'{slug(name)}.json'
        if row.k not in groups:
            groups[row.k] = groups_of(row.k, members, ws, opts.n_groups, opts.seed, device)[
                opts.skip_groups :
            ]
        if (opts.rows is None or name in opts.rows) and not path.exists():
            begin = time.process_time()
            pictures = release(row, groups[row.k], members, ws, psp, opts, device)
            seconds = (time.process_time() - begin) / len(groups[row.k])
            with atomic_path(path.with_suffix('.npy')) as temp, open(temp, 'wb') as file:
                np.save(file, pictures)
            found = appraiser.measure(pictures, groups[row.k])
            write_json(path, {'k': row.k, 'seconds': seconds, **found})
        if path.exists():
            results[name] = json.loads(path.read_text(encoding='utf-8'))
            log.info('\n%s', markdown({name: results[name]}))
    write_text(opts.out_dir / 'frontier.md', markdown(results))
    write_sheet(opts, results, members, groups[5])
    print(f'{describe(device)}\n\n{markdown(results)}')


if __name__ == '__main__':
    run(main)
