"""What insiders find out of a finished run of scripts/k-SALSA.py: subtraction and replay.

    python benchmarks/insiders.py --run=runs/release_k5 --out_dir=runs/insiders

Subtraction, for every member: all others of his group subtract their latents from that of its
picture, as the encoder finds it; at which place does he come among everybody else? Replay, for a
member of each of a few groups: the picture is made again with every candidate for his place,
without the secret start (--start_noise, --epsilon), if there was one, which is not theirs. Writes
insiders.json and insiders.md. With runs of and without a secret start, the two tables compare.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from anonymization import Networks, Settings
from anonymization.networks import Loaded
from anonymization.optimize import Group, GroupOptimizer
from anonymization.photographs import open_photographs
from benchmarks.machine import describe
from datasets.groups import read_groups
from datasets.pictures import load_pictures
from datasets.table import Table, read_table
from evaluation.attacks.insiders import replay_ranks, subtraction_ranks
from evaluation.bootstrap import rate_interval
from models.psp import PSP, FrozenPSP, invert
from utils import cli
from utils.errors import UserError
from utils.images import from_uint8, to_uint8
from utils.io import write_json, write_text
from utils.logs import setup_logging

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument('--run', type=Path, required=True, metavar='DIR', help='run of k-SALSA.py')
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='results')
    p.add_argument(
        '--groups', type=cli.positive_int, default=10, metavar='N', help='groups replayed'
    )
    p.add_argument(
        '--candidates',
        type=cli.positive_int,
        default=5,
        metavar='N',
        help='people for the last place of a replayed group, the right one among them',
    )
    return cli.add_common(p)


def read_run(run: Path) -> tuple[dict, Table, Int[np.ndarray, ' n'], list[Path]]:
    """Options, photographs, index of each one's picture (-1: none), and the picture files."""
    try:
        record = json.loads((run / 'private/options.json').read_text(encoding='utf-8'))
        options = record['options']
        groups = read_groups(run / 'private/groups.csv')
        part = {name: options.get(name) for name in ('split', 'n_images')}
        table = read_table(options['df'], options['data_path'], **part)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--run {run}: not a finished run of scripts/k-SALSA.py') from error
    of = {member: i for i, group in enumerate(groups) for member in group.members}
    files = [run / f'release/images/{group.release_name}.png' for group in groups]
    return options, table, np.array([of.get(i, -1) for i in table.ids]), files


def inverted(
    psp: PSP, pictures: UInt8[np.ndarray, 'C 3 S S'], n_iters: int
) -> Float[np.ndarray, 'C L D']:
    """Latents of pictures, as the encoder finds them."""
    frozen = FrozenPSP(psp, torch.float32)
    x = from_uint8(torch.from_numpy(pictures))
    return torch.cat([invert(frozen, part, n_iters=n_iters).ws for part in x.split(8)]).numpy()


def remaker(
    loaded: Loaded, settings: Settings, table: Table, run: Path
) -> Callable[[Int[np.ndarray, ' k']], UInt8[np.ndarray, '3 R R']]:
    """Makes the picture of any rows of a run, as the run would, without a secret start."""
    photos = open_photographs(run / 'private')
    latents, content = (np.load(run / f'private/{n}.npy') for n in ('latents', 'content'))
    engine = GroupOptimizer(
        loaded.psp,
        loaded.content,
        loaded.style,
        config=settings.optimize,
        device='cpu',
        precision=settings.precision,
        guide=loaded.guide,
    )

    def remake(rows: Int[np.ndarray, ' k']) -> UInt8[np.ndarray, '3 R R']:
        group = Group(
            torch.from_numpy(latents[rows]),
            torch.stack([photos[int(i)] for i in rows]),
            torch.from_numpy(content[rows]),
        )
        return to_uint8(engine.run([group]).image)[0].numpy()

    return remake


def rate(hits: np.ndarray) -> dict[str, float]:
    low, high = rate_interval(hits)
    return {'value': float(np.mean(hits)), 'low': low, 'high': high}


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    options, table, group_of, files = read_run(opts.run)
    settings = Settings.from_options(options)
    loaded = Networks.from_options(options).load(settings.optimize)
    side = loaded.psp.input_size
    seen = inverted(loaded.psp, load_pictures([[f] for f in files], side), settings.n_iters)
    ranks, chance = subtraction_ranks(seen, np.load(opts.run / 'private/latents.npy'), group_of)
    places, equal = replay_ranks(
        remaker(loaded, settings, table, opts.run),
        load_pictures([[f] for f in files], loaded.psp.decoder.size),
        group_of,
        n_groups=opts.groups,
        n_candidates=opts.candidates,
        seed=opts.seed,
    )
    result: dict[str, Any] = {
        'start_noise': settings.start_noise,
        'epsilon': settings.noise.epsilon,
        'k': settings.k,
        'subtraction_first': {**rate(ranks == 1), 'chance': chance, 'members': len(ranks)},
        'replay_first': {**rate(places == 1), 'chance': 1 / opts.candidates, 'groups': len(places)},
        'replay_equal': rate(equal),
        'machine': describe(torch.device('cpu')),
    }
    write_json(opts.out_dir / 'insiders.json', result)
    lines = ['| what | rate | 95 % | chance |', '|---|---|---|---|']
    for name in ('subtraction_first', 'replay_first', 'replay_equal'):
        r = result[name]
        chance_text = f'{r["chance"]:.3f}' if 'chance' in r else '-'
        lines.append(
            f'| {name} | {r["value"]:.3f} | {r["low"]:.3f} to {r["high"]:.3f} | {chance_text} |'
        )
    write_text(opts.out_dir / 'insiders.md', '\n'.join(lines) + '\n')
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    cli.run(main)
