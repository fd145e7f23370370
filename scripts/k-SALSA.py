"""Makes a k-anonymous set of synthetic fundus photographs from private ones.

    python scripts/k-SALSA.py --exp_dir=runs/aptos_k5 --checkpoint_path=restyle.pt \\
        --data_path=photos/ --df=labels.csv --same_k=5 --num_steps=100 --num_crop=4 \\
        --content_weight=1e2 --style_weight=1e-6

Stages: read the table and check every image; invert; group; optimise one latent per group; write;
verify. The same command goes on where a run stopped. In --exp_dir:

    release/   images/, their grades, manifest, datasheet, report: what may be shared
    private/   group table, latents, losses, contact sheet of members and results: never share

Several processes or machines: torchrun --nproc_per_node=N scripts/k-SALSA.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Sequence

from anonymization import Networks, Settings, anonymize
from anonymization.card import FIELDS as CARD_FIELDS
from anonymization.card import read_card
from configs.paths_config import model_paths
from datasets.table import read_table
from models.features.style import FILTERS
from utils import cli, distributed
from utils.logs import setup_logging
from utils.options import add_flags

log = logging.getLogger(__name__)

_NO_EFFECT = (
    'label_path',
    'model_1_checkpoint_path',
    'model_2_checkpoint_path',
    'edit_directions',
    'factor_ranges',
    'layer_idx',
)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    _add_required(p.add_argument_group('required'))
    add_networks(p.add_argument_group('networks'))
    add_flags(p, Settings)
    p.set_defaults(data='aptos')
    g = p.add_argument_group('beside the release')
    g.add_argument(
        '--card',
        type=Path,
        metavar='YAML',
        help='licence, name, contact and the like for README.md and croissant.json: '
        f'any of {", ".join(CARD_FIELDS)} (default: [brackets] in their place)',
    )
    cli.add_device(g)
    g.add_argument(
        '--test_workers',
        '--workers',
        type=cli.nonnegative_int,
        default=2,
        metavar='N',
        help='photographs decoded at a time, at least one per core',
    )
    g = p.add_argument_group('published flags without effect')
    for name in _NO_EFFECT:
        g.add_argument(f'--{name}', metavar='X', help='accepted, never used')
    return p


def _add_required(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--exp_dir', '--out_dir', type=Path, required=True, metavar='DIR', help='output folder'
    )
    g.add_argument(
        '--checkpoint_path',
        '--checkpoint',
        type=Path,
        required=True,
        metavar='FILE',
        help='ReStyle-pSp checkpoint, from scripts/train_restyle_psp.py',
    )
    g.add_argument(
        '--data_path',
        '--image_dir',
        type=Path,
        required=True,
        metavar='DIR',
        help='folder of photographs, <id> with any usual image suffix',
    )
    g.add_argument(
        '--df',
        '--table',
        type=Path,
        required=True,
        metavar='CSV',
        help='table of ids (id_code or image), optionally with diagnosis or level, '
        'patient_id, eye, split',
    )
    g.add_argument('--split', metavar='NAME', help='use these rows of the table only')
    g.add_argument(
        '--n_images',
        type=cli.positive_int,
        metavar='N',
        help='use the first N rows of the table only, for a trial',
    )


def add_networks(g: argparse._ArgumentGroup) -> None:
    """Adds the flags of the feature networks."""
    for role, published, own in (
        ('content', 'MoCo v2, from scripts/train_content_encoder.py', 'moco'),
        ('style', f'VGG19, {FILTERS!r} for the built-in filter bank', 'vgg19'),
    ):
        g.add_argument(
            f'--{role}_weights',
            metavar='FILE|lite0',
            help=f'{role} network: {published}, an installed network (lite0, lite1, lite2), or a '
            f'file with --{role}_arch (default: "{own}" in configs/paths_config.py)',
        )
        g.add_argument(
            f'--{role}_arch',
            metavar='NAME',
            help=f'timm architecture of the file of --{role}_weights',
        )
    g.add_argument(
        '--guide',
        type=Path,
        metavar='FILE',
        help='what a grader of public photographs reads in the content network: guide.pt of '
        "classification/main.py -config guide.yaml; pictures keep what it reads in the members' "
        'mean',
    )


def networks_of(opts: argparse.Namespace) -> Networks:
    """The networks that the flags name, or those of paths_config; no style network without need."""
    style = opts.style_weights or model_paths['vgg19']
    if opts.style_weights is None and opts.style_weight == 0:
        style = None
    content = opts.content_weights or model_paths['moco']
    assert content is not None  # paths_config gives it a default
    return Networks(
        opts.checkpoint_path, content, style, opts.content_arch, opts.style_arch, opts.guide
    )


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device = distributed.init(cli.resolve_device(opts.device))
    setup_logging(level=logging.INFO if distributed.is_main() else logging.WARNING)
    for name in _NO_EFFECT:
        if getattr(opts, name) is not None:
            log.warning('--%s has no effect (it had none in the published code)', name)
    settings = Settings.from_options(vars(opts))
    settings.check()
    table = read_table(opts.df, opts.data_path, split=opts.split, n_images=opts.n_images)
    release = anonymize(
        table,
        networks_of(opts),
        settings,
        opts.exp_dir,
        device=device,
        workers=opts.test_workers,
        card=read_card(opts.card) if opts.card else None,
    )
    if distributed.is_main():
        log.info('release to share:        %s', release.folder)
        log.info('report:                  %s', release.folder / 'report.html')
        log.info('contact sheet (private): %s', opts.exp_dir / 'private' / 'contact_sheet.png')
    distributed.shutdown()
    return 0


if __name__ == '__main__':
    cli.run(main)
