"""The flags by which both commands of the attack name a release, under their published names."""

import argparse
from pathlib import Path

from evaluation.attacks.groups import (
    KINDS,
    KnownRelease,
    ReleaseFiles,
    chosen_files,
    read_known_release,
)
from utils import cli


def _names(part: str) -> tuple[str, str, str]:
    return f'{part}_df_path', f'{part}_image_path', 'centroid_image_path'


def add_release_flags(p: argparse._ArgumentGroup, part: str) -> None:
    """Adds the flags of a release; part: 'train' or 'test'."""
    table, photographs, pictures = _names(part)
    p.add_argument(
        '--samek',
        '--k',
        type=cli.positive_int,
        default=5,
        metavar='INT',
        help='group size k of the release',
    )
    p.add_argument(
        '--centroid_type',
        choices=KINDS,
        default=KINDS[0],
        help='k-SALSA pictures, or plain averages (<id>_centroids.png)',
    )
    p.add_argument('--data', default='aptos', metavar='TEXT', help='part of the file names')
    p.add_argument(
        '--run',
        type=Path,
        metavar='DIR',
        help='run folder of scripts/k-SALSA.py, in place of the next three flags',
    )
    p.add_argument(
        f'--{table}',
        type=Path,
        metavar='PATH',
        help=f'group table, or the folder that holds {", ".join(table_names(part, "<k>"))}',
    )
    p.add_argument(
        f'--{photographs}',
        type=Path,
        metavar='DIR',
        help='the source photographs, <id>.png or another suffix',
    )
    p.add_argument(f'--{pictures}', type=Path, metavar='DIR', help='pictures of the release')


def table_names(part: str, k: int | str) -> list[str]:
    """File names under which a group table is looked for, in this order."""
    published = [f'TEST_k{k}_nearest_df.csv'] if part == 'test' else []
    return [*published, f'k{k}_nearest_df.csv', 'groups.csv']


def release_files(opts: argparse.Namespace, part: str) -> ReleaseFiles:
    """Where the release lies; UserError that names all flags that are missing."""
    names = _names(part)
    return chosen_files(
        ReleaseFiles(*(getattr(opts, n) for n in names)), opts.run, opts.centroid_type, names
    )


def read_release(opts: argparse.Namespace, part: str, size: int) -> KnownRelease:
    """The release that the flags name, pictures of `size` px."""
    return read_known_release(
        release_files(opts, part),
        table_names(part, opts.samek),
        opts.centroid_type,
        size,
        _names(part),
    )
