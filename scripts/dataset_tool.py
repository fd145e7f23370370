"""Makes a training archive (ZIP or folder in the StyleGAN2-ADA layout) from photographs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence
from typing import Any

import pandas as pd

from anonymization.release import check_outside_release
from datasets.dicom import photograph_table
from datasets.prepare import FILTERS, TRANSFORMS, build_archive, check_options
from datasets.sources import SourceImage, list_source
from utils import cli
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES
from utils.io import write_csv, write_json
from utils.logs import setup_logging

EPILOG = f"""examples:
  python scripts/dataset_tool.py --source photos/ --dest fundus256.zip \\
      --transform fundus --width 256 --height 256
  python scripts/dataset_tool.py --source a/labels.csv --source b.zip --split train \\
      --dest pooled.zip --transform fundus --width 512 --height 512

Files that end in {' '.join(IMAGE_SUFFIXES)} are read, others passed over.
A report of every source image (kept or left out, and why) is written beside the archive as
<dest>.report.json and <dest>.report.csv. It names source files: keep it with the private data.
"""


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, EPILOG)
    for add in (_add_source, _add_transform, _add_output):
        add(p)
    return p


def _add_source(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        '--source',
        action='append',
        required=True,
        metavar='PATH',
        help='folder (of pictures, or of DICOM files), ZIP archive or CSV table; repeat '
        'the flag to pool several',
    )
    p.add_argument('--dest', required=True, metavar='PATH', help='new .zip file or folder')
    p.add_argument(
        '--image_dir',
        '--image-dir',
        metavar='DIR',
        help='where the images of the CSV tables are (default: images/ beside the '
        'table, or its own folder)',
    )
    p.add_argument('--split', metavar='NAME', help='only CSV rows of this split')
    p.add_argument(
        '--max_images',
        '--max-images',
        type=cli.positive_int,
        metavar='N',
        help='stop after N kept images',
    )


def _add_transform(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        '--transform',
        choices=TRANSFORMS,
        default='none',
        help='fundus: crop to the circular field of view and pad to a square',
    )
    p.add_argument(
        '--resize_filter',
        '--resize-filter',
        choices=sorted(FILTERS),
        default='lanczos',
        help='antialiasing filter',
    )
    p.add_argument(
        '--width', type=cli.positive_int, metavar='PX', help='output width (default: as it comes)'
    )
    p.add_argument(
        '--height', type=cli.positive_int, metavar='PX', help='output height (default: the width)'
    )
    p.add_argument(
        '--mask',
        action='store_true',
        help='blacken everything outside the field of view (text, notches, glare)',
    )
    p.add_argument(
        '--unsqueeze',
        action='store_true',
        help='stretch an elliptical field of view back to the circle the camera saw',
    )
    p.add_argument(
        '--one_side',
        '--one-side',
        action='store_true',
        help='mirror photographs whose optic disc lies left of the centre (found in '
        'the picture; the report says which), so that all look like right eyes',
    )


def _add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        '--keep_names',
        '--keep-names',
        action='store_true',
        help='keep the file names, in a folder; with a CSV table its rows are copied '
        'to labels.csv beside the images, so that the folder replaces the '
        'photographs for the other scripts (DICOM: a table of patient, eye and '
        'visit is made from the tags)',
    )
    p.add_argument(
        '--burned_in_text',
        '--burned-in-text',
        action='store_true',
        help='accept DICOM files whose header says that text is burned into the '
        'picture (--mask accepts them too, and blackens what is outside the field '
        'of view)',
    )
    p.add_argument(
        '--workers', type=cli.positive_int, default=4, metavar='N', help='decoding threads'
    )


def copy_table(source: str | Path, split: str | None, kept: pd.Series, dest: str | Path) -> None:
    """The rows of the table `source` whose images were kept, in a new table."""
    rows = pd.read_csv(source, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    rows.columns = [c.strip() for c in rows.columns]
    if split is not None:
        rows = rows[rows['split'].str.strip() == split]
    write_csv(dest, rows.iloc[: len(kept)][kept.to_numpy()])


def check_paths(sources: Sequence[str], dest: str | Path) -> None:
    """UserError for a source named twice, and for a --dest that would be read again next time."""
    check_outside_release(dest, '--dest')
    resolved = [Path(s).resolve() for s in sources]
    if double := [s for i, s in enumerate(sources) if resolved[i] in resolved[:i]]:
        raise UserError(f'--source {double[0]} is given twice')
    inside = [
        s for s, r in zip(sources, resolved) if r.is_dir() and r in Path(dest).resolve().parents
    ]
    if inside:
        raise UserError(
            f'--dest {dest} lies inside --source {inside[0]}, which would be read as '
            'photographs the next time; choose a place outside'
        )
    if Path(dest).suffix.lower() in ('.tar', '.gz', '.tgz', '.7z', '.rar', '.lmdb'):
        raise UserError(
            f'--dest {dest}: archives are ZIP files; end the name in .zip, or give a folder'
        )


def write_reports(dest: Path, summary: dict[str, Any], report: pd.DataFrame) -> None:
    """Writes the two reports beside `dest`, for the owner alone: they name source files."""
    files = [dest.with_name(f'{dest.name}.report.{kind}') for kind in ('json', 'csv')]
    write_json(files[0], summary)
    write_csv(files[1], report)
    for path in files:
        path.chmod(0o600)


def check_flags(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """UserError for flags that do not go together; returns (width, height)."""
    check_paths(args.source, args.dest)
    width, height = check_options(
        args.transform, args.width, args.height, mask=args.mask, unsqueeze=args.unsqueeze
    )
    side = width
    if side is not None and side & (side - 1):
        raise UserError(f'--width {side}: the generator takes powers of two (64, 128, 256, ...)')
    if args.image_dir and not any(s.lower().endswith('.csv') for s in args.source):
        raise UserError('--image_dir belongs to a CSV table; none is among --source')
    if args.keep_names and args.dest.lower().endswith('.zip'):
        raise UserError('--keep_names makes a folder; give a --dest that does not end in .zip')
    return width, height


def write_table(args: argparse.Namespace, images: Sequence[SourceImage], kept: pd.Series) -> None:
    """--keep_names: labels.csv beside the images, from the one CSV table or the DICOM tags."""
    dest = Path(args.dest) / 'labels.csv'
    if len(args.source) == 1 and args.source[0].lower().endswith('.csv'):
        copy_table(args.source[0], args.split, kept, dest)
        return
    found = [
        (item.dicom, Path(item.name).stem)
        for item, keep in zip(images, kept)
        if keep and item.dicom is not None
    ]
    if found:
        photographs, ids = map(list, zip(*found))
        write_csv(dest, photograph_table(photographs, ids))


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging()
    width, height = check_flags(args)
    images = [
        item
        for source in args.source
        for item in list_source(
            source,
            image_dir=args.image_dir,
            split=args.split,
            burned_in=args.burned_in_text or args.mask,
        )
    ]
    report = build_archive(
        images,
        args.dest,
        transform=args.transform,
        width=width,
        height=height,
        resample=args.resize_filter,
        mask=args.mask,
        unsqueeze=args.unsqueeze,
        max_images=args.max_images,
        workers=args.workers,
        keep_names=args.keep_names,
        one_side=args.one_side,
    )
    if args.keep_names:
        write_table(args, images, report['kept'])
    left_out = report[~report['kept']]
    beside = Path(args.dest)
    summary = {
        'options': vars(args),
        'images_listed': len(images),
        'images_read': len(report),
        'images_kept': int(report['kept'].sum()),
        'left_out': [
            {'source': r.source, 'name': r.name_, 'reason': r.reason}
            for r in left_out.rename(columns={'name': 'name_'}).itertuples()
        ],
    }
    write_reports(beside, summary, report)
    print(f'{summary["images_kept"]} images written to {args.dest}, {len(left_out)} left out')
    return 0


if __name__ == '__main__':
    cli.run(main)
