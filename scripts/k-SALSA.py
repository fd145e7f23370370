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
from anonymization.grouping import METHODS, POLICIES, SURPLUS
from anonymization.optimize import GUIDE_WEIGHT, PRECISIONS, STYLE_RATIO
from anonymization.settings import STRATA
from configs.paths_config import model_paths
from criteria.gram_style import MODES as STYLE_MODES
from criteria.gram_style import STRIDES
from datasets.table import read_table
from models.features.style import FILTERS
from utils import cli, distributed
from utils.logs import setup_logging

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
    p = cli.parser(__doc__.splitlines()[0], '\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('required')
    g.add_argument('--exp_dir', type=Path, required=True, metavar='DIR', help='output folder')
    g.add_argument(
        '--checkpoint_path',
        type=Path,
        required=True,
        metavar='FILE',
        help='ReStyle-pSp checkpoint, from scripts/train_restyle_psp.py',
    )
    g.add_argument(
        '--data_path',
        type=Path,
        required=True,
        metavar='DIR',
        help='folder of photographs, <id> with any usual image suffix',
    )
    g.add_argument(
        '--df',
        type=Path,
        required=True,
        metavar='CSV',
        help='table of ids (id_code or image), optionally with diagnosis or level, '
        'patient_id, eye, split',
    )
    g = p.add_argument_group('groups')
    g.add_argument(
        '--same_k',
        type=cli.positive_int,
        default=5,
        metavar='K',
        help='fewest distinct patients in a group',
    )
    g.add_argument(
        '--clustering',
        choices=METHODS,
        default='default',
        help="how groups are found; published: the paper's greedy",
    )
    g.add_argument(
        '--policy',
        choices=POLICIES,
        default='distinct',
        help="distinct: no patient twice in a group; together: all of a patient's "
        'images in one group',
    )
    g.add_argument(
        '--surplus',
        choices=SURPLUS,
        default='error',
        help='a patient with more images than there are groups: stop, or leave out '
        'the images that fit nowhere',
    )
    g.add_argument(
        '--strata',
        nargs='+',
        choices=sorted(STRATA),
        default=[],
        help='columns that groups never cross; referable: grades 0 and 1 against 2 to 4',
    )
    g.add_argument(
        '--grade_penalty',
        type=cli.nonnegative_float,
        default=0.0,
        metavar='SHARE',
        help='how much unlike grades count against a group, in parts of the variance of the '
        'latents (0: not at all)',
    )
    g.add_argument(
        '--reduce_dim',
        type=cli.positive_int,
        metavar='D',
        help='group on the first D principal components (default: as needed)',
    )
    g.add_argument(
        '--mirror_left', action='store_true', help='mirror left eyes, so that optic discs align'
    )
    g.add_argument('--split', metavar='NAME', help='use these rows of the table only')
    g.add_argument(
        '--n_images',
        type=cli.positive_int,
        metavar='N',
        help='use the first N rows of the table only, for a trial',
    )
    g = p.add_argument_group('optimisation')
    g.add_argument(
        '--start_noise',
        type=cli.nonnegative_float,
        default=0.0,
        metavar='SD',
        help="secret noise on every group's start, in standard deviations of the generator's "
        'latents, so that nobody can repeat the run',
    )
    g.add_argument(
        '--start_key',
        metavar='FILE',
        help='key of that noise, such as private/start.key of another run (default: a new one)',
    )
    g.add_argument(
        '--num_steps',
        type=cli.nonnegative_int,
        default=100,
        metavar='STEPS',
        help='optimisation steps per group; 0 gives the centroid',
    )
    g.add_argument(
        '--num_crop', type=cli.positive_int, default=4, metavar='N', help='patch grid is N x N'
    )
    g.add_argument(
        '--content_weight',
        type=cli.nonnegative_float,
        default=1e2,
        metavar='FLOAT',
        help='weight of the content loss',
    )
    g.add_argument(
        '--style_weight',
        type=cli.auto_or(cli.nonnegative_float),
        default=1e-6,
        metavar='FLOAT|auto',
        help='weight of the style loss; 0 needs no style network; auto: as --style_ratio says',
    )
    g.add_argument(
        '--style_ratio',
        type=cli.positive_float,
        default=STYLE_RATIO,
        metavar='FLOAT',
        help='with --style_weight=auto: length of the style gradient '
        'over that of the content gradient, in the first step',
    )
    g.add_argument(
        '--lr',
        type=cli.auto_or(cli.positive_float),
        default=0.1,
        metavar='FLOAT|auto',
        help='peak learning rate of the latents; auto: 1/40 of the standard deviation '
        "of the generator's latents",
    )
    g.add_argument(
        '--style_mode',
        choices=STYLE_MODES,
        help='best_match: every patch of a member draws the patch most like it '
        "(published); same_place: patches are drawn to the mean of the members' "
        'patches; whole: the picture is one patch (default: best_match for VGG19 '
        'and filters, whole for other networks)',
    )
    g.add_argument(
        '--style_strides',
        type=cli.positive_int,
        nargs='+',
        default=STRIDES,
        metavar='N',
        help='maps of these strides carry the style; VGG19 and filters have one map only',
    )
    g.add_argument(
        '--n_iters_per_batch',
        type=cli.positive_int,
        default=5,
        metavar='N',
        help='refinements of the inversion',
    )
    g.add_argument(
        '--content_weights',
        metavar='FILE|lite0',
        help='content network: MoCo v2, from scripts/train_content_encoder.py, an '
        'installed network (lite0, lite1, lite2), or a file with --content_arch '
        '(default: "moco" in configs/paths_config.py)',
    )
    g.add_argument(
        '--content_arch', metavar='NAME', help='timm architecture of the file of --content_weights'
    )
    g.add_argument(
        '--style_weights',
        metavar='FILE|lite0',
        help=f'VGG19 file, an installed network (lite0, lite1, lite2), {FILTERS!r} for '
        'the built-in filter bank, or a file with --style_arch (default: "vgg19" '
        'in configs/paths_config.py)',
    )
    g.add_argument(
        '--style_arch', metavar='NAME', help='timm architecture of the file of --style_weights'
    )
    g.add_argument(
        '--guide',
        type=Path,
        metavar='FILE',
        help='what a grader of public photographs reads in the content network: guide.pt of '
        "classification/main.py -config guide.yaml; pictures keep what it reads in the members' "
        'mean',
    )
    g.add_argument(
        '--guide_weight',
        type=cli.nonnegative_float,
        default=GUIDE_WEIGHT,
        metavar='FLOAT',
        help='weight of the guide within the content loss',
    )
    g = p.add_argument_group('output')
    g.add_argument(
        '--resize_outputs',
        action='store_true',
        help="write pictures at the encoder's size instead of the generator's",
    )
    g.add_argument(
        '--soft_labels',
        action='store_true',
        help='labels.csv and metadata.csv also give the share of each grade',
    )
    g.add_argument(
        '--card',
        type=Path,
        metavar='YAML',
        help='licence, name, contact and the like for README.md and croissant.json: '
        f'any of {", ".join(CARD_FIELDS)} (default: [brackets] in their place)',
    )
    g.add_argument(
        '--centroids',
        action='store_true',
        help='also write the plain latent-mean pictures to private/centroids/',
    )
    g.add_argument(
        '--save_reconstructions',
        action='store_true',
        help='also write every inverted photograph to private/reconstructions/',
    )
    g.add_argument(
        '--data',
        default='aptos',
        metavar='NAME',
        help='name of the data set, kept in private/options.json',
    )
    g = p.add_argument_group('machine')
    g.add_argument(
        '--test_batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='photographs per unit of work, on a GPU inverted together (not tied to k)',
    )
    g.add_argument(
        '--group_batch',
        type=cli.positive_int,
        metavar='N',
        help='groups optimised at a time (default: on a CPU one per core, on a GPU what '
        'memory allows)',
    )
    g.add_argument(
        '--test_workers', type=cli.nonnegative_int, default=2, metavar='N', help='loading processes'
    )
    g.add_argument(
        '--precision', choices=PRECISIONS, default='fp32', help='arithmetic of the optimisation'
    )
    g.add_argument(
        '--deterministic',
        action='store_true',
        help='the same bytes again on a GPU too: deterministic operations, every '
        'photograph and group alone; slower. On a CPU it is always so',
    )
    cli.add_common(g)
    g = p.add_argument_group('published flags without effect')
    for name in _NO_EFFECT:
        g.add_argument(f'--{name}', metavar='X', help='accepted, never used')
    return p


def networks_of(opts: argparse.Namespace) -> Networks:
    """The networks that the flags name, or those of paths_config; no style network without need."""
    style = opts.style_weights or model_paths['vgg19']
    if opts.style_weights is None and opts.style_weight == 0:
        style = None
    return Networks(
        opts.checkpoint_path,
        opts.content_weights or model_paths['moco'],
        style,
        opts.content_arch,
        opts.style_arch,
        opts.guide,
    )


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
