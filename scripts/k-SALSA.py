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
import json
import logging
import os
import shutil

from matplotlib.figure import Figure
from torch import nn

from anonymization.audit import audit_release, plot_distances, report_dict, report_text
from anonymization.card import FIELDS as CARD_FIELDS
from anonymization.card import Card, named_in, read_card
from anonymization.grouping import METHODS, POLICIES, SURPLUS
from anonymization.optimize import PRECISIONS, STYLE_RATIO, OptimizeConfig, style_term
from anonymization.photographs import read_digests
from anonymization.pipeline import Pipeline
from anonymization.records import FACTS, write_card
from anonymization.release import MANIFEST, check_outside_release, describe_anew
from anonymization.settings import Settings
from anonymization.signature import signature_path
from anonymization.workers import one_thread
from configs.paths_config import model_paths
from criteria.gram_style import MODES as STYLE_MODES
from criteria.gram_style import STRIDES
from datasets.table import Table, read_table
from models.features.content import load_content_network
from models.features.pretrained import FeatureNetwork, weight_file
from models.features.style import FILTERS, load_style_network
from models.psp import load_psp
from utils import cli, distributed
from utils.errors import PrivacyError, UserError, listing
from utils.io import atomic_path, sha256_file, write_json
from utils.logs import setup_logging
from utils.runs import run_record, start_run, versions

log = logging.getLogger(__name__)

STRATA = {'eye': 'eyes', 'label': 'labels', 'visit': 'visits', 'split': 'splits'}
_NO_EFFECT = (
    'label_path',
    'model_1_checkpoint_path',
    'model_2_checkpoint_path',
    'edit_directions',
    'factor_ranges',
    'layer_idx',
)
# Flags that may differ when a run goes on: they do not change what is computed, or the content of
# the files they name is compared instead.
_FREE = (
    'exp_dir',
    'checkpoint_path',
    'data_path',
    'df',
    'content_weights',
    'style_weights',
    'test_workers',
    'device',
    'group_batch',
    'card',
)  # networks: their digests


def build_parser():
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
        help='columns that groups never cross',
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


def check_options(opts: argparse.Namespace) -> Table:
    """Everything that can be said without opening a weight file."""
    if opts.same_k < 2:
        raise UserError("--same_k 1: a group of one is the patient's own picture; use 2 or more")
    table = read_table(opts.df, opts.data_path, split=opts.split)
    if opts.n_images:
        table = table.subset(range(min(opts.n_images, len(table))))
    people = len(set(table.patients)) if table.patients else len(table)
    if people < opts.same_k:
        kind = 'patients' if table.patients else 'images'
        raise UserError(f'--same_k {opts.same_k}: the table has only {people} {kind}')
    if not table.patients:
        log.warning(
            '%s has no patient column: images are counted, not people; two photographs '
            'of one person may stand for two',
            opts.df,
        )
    for name in _NO_EFFECT:
        if getattr(opts, name) is not None:
            log.warning('--%s has no effect (it had none in the published code)', name)
    return table


def check_card(opts: argparse.Namespace, table: Table) -> Card:
    """The institution's fields; UserError where they name a photograph or a patient."""
    card = read_card(opts.card)
    if named := named_in(card, table.ids, table.patients):
        raise UserError(
            listing(
                f'--card {opts.card} names photographs or patients, and is for '
                'everyone to read; take them out',
                named,
            )
        )
    return card


def check_folders(opts: argparse.Namespace) -> None:
    """UserError for an --exp_dir among the photographs, or with a release/ of something else."""
    check_outside_release(opts.exp_dir, '--exp_dir')
    exp_dir, photos = opts.exp_dir.resolve(), opts.data_path.resolve()
    if exp_dir == photos or photos in exp_dir.parents:
        raise UserError(
            f'--exp_dir {opts.exp_dir} lies in --data_path {opts.data_path}: results '
            'would stand among the photographs; choose another folder'
        )
    release = opts.exp_dir / 'release'
    if release.is_dir() and (release / MANIFEST).is_file():
        return
    if release.exists() and not (release.is_dir() and not any(release.iterdir())):
        raise UserError(
            f'{release} exists and is no finished release (no {MANIFEST}); move it '
            'away, and the same command makes it anew'
        )


def make_folders(exp_dir: Path, private: Path) -> None:
    """Makes --exp_dir and its private folder, which only its owner enters."""
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)
    except OSError as error:
        raise UserError(
            f'--exp_dir {exp_dir} cannot be made ({error.strerror}); choose another folder'
        ) from error


def check_finished(release: Path) -> Card | None:
    """The card of a published release; UserError when it is not what its manifest says."""
    try:
        manifest = json.loads((release / MANIFEST).read_text(encoding='utf-8'))
        bad = sorted(
            n
            for n, digest in manifest['files'].items()
            if not (release / n).is_file() or sha256_file(release / n) != digest
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest, bad = {}, [MANIFEST]
    if bad:
        raise UserError(
            listing(
                f'{release} is finished, but {len(bad)} of its files are damaged '
                'or missing; move it away, and the same command makes it anew',
                bad,
            )
        )
    return manifest.get('card')


def style_path(opts: argparse.Namespace) -> str | Path | None:
    """What the flag names, or the VGG19 file of paths_config; None for no style at all."""
    if opts.style_weights is None and opts.style_weight == 0:
        return None
    return opts.style_weights or model_paths['vgg19']


def network_inputs(opts: argparse.Namespace) -> dict[str, str | Path]:
    """Weight files by role, for the run record."""
    files = {
        'checkpoint': opts.checkpoint_path,
        'content network': weight_file(opts.content_weights or model_paths['moco']),
    }
    if style_path(opts) not in (None, FILTERS):
        files['style network'] = weight_file(style_path(opts))
    return files


def feature_networks(opts: argparse.Namespace, side: int) -> tuple[nn.Module, nn.Module | None]:
    """The content and the style network, one object where they are the same; style may be None.

    UserError when a file is none, and when pictures of `side` px are too small for a network.
    """
    content = opts.content_weights or model_paths['moco'], opts.content_arch
    style = style_path(opts), opts.style_arch
    content_net = load_content_network(content[0], arch=content[1])
    if isinstance(content_net, FeatureNetwork):
        content_net.check_side(side)
    if style[0] is None:
        return content_net, None
    same = content == style and isinstance(content_net, FeatureNetwork)
    style_net = content_net if same else load_style_network(style[0], arch=style[1])
    style_term(style_net, optimize_config(opts)).check_side(side)
    return content_net, style_net


def network_facts(net: nn.Module | None, file: str | Path | None) -> str:
    """Name and SHA-256 of a network, for the manifest."""
    if net is None:
        return 'none'
    return net.name + (f' {sha256_file(file)}' if file else '')


def optimize_config(opts: argparse.Namespace) -> OptimizeConfig:
    return OptimizeConfig(
        n_steps=opts.num_steps,
        n_crop=opts.num_crop,
        content_weight=opts.content_weight,
        style_weight=opts.style_weight,
        lr=opts.lr,
        style_mode=opts.style_mode,
        style_ratio=opts.style_ratio,
        style_strides=tuple(opts.style_strides),
    )


def publish(staging, release, opts, table):
    """Verifies the staged release and moves it into place; PrivacyError when it fails."""
    private = opts.exp_dir / 'private'
    audit = audit_release(staging, private=private, source_table=table)
    write_json(private / 'audit.json', report_dict(audit, private=True))
    if audit.distances is not None:
        figure = Figure(figsize=(8, 4), layout='constrained')
        plot_distances(audit, figure.subplots())
        with atomic_path(private / 'audit_distances.png') as temp:
            figure.savefig(temp, format='png')
    log.info('verification:\n%s', report_text(audit))
    if not audit.passed:
        raise PrivacyError(
            f'the release fails its verification and is not published (it is in '
            f'{staging}): '
            + '; '.join(f'{c.name}: {c.detail}' for c in audit.checks if not c.passed)
        )
    former = private / 'former_release'
    shutil.rmtree(former, ignore_errors=True)
    if release.exists():
        release.rename(former)
    staging.rename(release)
    shutil.rmtree(former, ignore_errors=True)


def finish(release: Path, opts: argparse.Namespace, table: Table, card: Card) -> None:
    """Looks at a published release; with another --card its pages are written anew."""
    there = check_finished(release)
    if opts.card is None or there == card:
        log.info('%s is complete; choose another --exp_dir for another run', release)
        return
    private = opts.exp_dir / 'private'
    shutil.rmtree(private / 'staging', ignore_errors=True)
    describe_anew(release, private / 'staging', card)
    before = json.loads((private / FACTS).read_text(encoding='utf-8'))['facts'].get('card')
    write_card(private, card)
    try:
        publish(private / 'staging', release, opts, table)
    except BaseException:
        write_card(private, before)
        raise
    log.info('%s says what --card says; the pictures are the same', release)
    if signature_path(release).exists():
        log.warning(
            '%s was made before and does not fit any more: sign the release again',
            signature_path(release),
        )


def main(argv=None):
    opts = build_parser().parse_args(argv)
    if opts.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read at its first use
    with one_thread() as threads:
        return make_release(opts, threads)


def make_release(opts: argparse.Namespace, threads: int) -> int:
    """The whole job; `threads` units of work at a time on a CPU. Returns the exit code."""
    device = distributed.init(cli.resolve_device(opts.device))
    setup_logging(level=logging.INFO if distributed.is_main() else logging.WARNING)
    check_folders(opts)
    table = check_options(opts)
    card = check_card(opts, table)
    digests = distributed.broadcast_object(
        read_digests(table.paths) if distributed.is_main() else None
    )
    files = network_inputs(opts)
    psp = load_psp(opts.checkpoint_path)
    content_net, style_net = feature_networks(opts, psp.input_size)
    private, release = opts.exp_dir / 'private', opts.exp_dir / 'release'
    if distributed.is_main():
        make_folders(opts.exp_dir, private)
        record = run_record(
            {k: v for k, v in vars(opts).items() if k not in _NO_EFFECT},
            inputs={**files, 'table': opts.df},
            seed=opts.seed,
        )
        record['inputs']['photographs'] = digests.files
        start_run(private, record, resume=True, free_options=_FREE)
    distributed.barrier()
    if (release / MANIFEST).exists():
        if distributed.is_main():
            finish(release, opts, table, card)
        return 0
    networks = {
        'generator and encoder': sha256_file(opts.checkpoint_path),
        'content': network_facts(content_net, files.get('content network')),
        'style': network_facts(style_net, files.get('style network')),
    }
    pipeline = Pipeline(
        opts.exp_dir,
        table,
        digests.pixels,
        psp=psp,
        content_net=content_net,
        style_net=style_net,
        settings=Settings(
            k=opts.same_k,
            clustering=opts.clustering,
            policy=opts.policy,
            surplus=opts.surplus,
            strata=tuple(STRATA[s] for s in opts.strata),
            reduce_dim=opts.reduce_dim,
            mirror_left=opts.mirror_left,
            n_iters=opts.n_iters_per_batch,
            batch_size=opts.test_batch_size,
            group_batch=opts.group_batch,
            precision=opts.precision,
            deterministic=opts.deterministic,
            optimize=optimize_config(opts),
            resize_outputs=opts.resize_outputs,
            soft_labels=opts.soft_labels,
            centroids=opts.centroids,
            save_reconstructions=opts.save_reconstructions,
            seed=opts.seed,
        ),
        device=device,
        facts={'networks': networks, 'versions': versions(), 'card': card},
        workers=opts.test_workers,
        threads=threads,
    )
    staging = private / 'staging'
    pipeline.run(staging)
    if distributed.is_main():
        publish(staging, release, opts, table)
        shutil.rmtree(private / 'work')
        log.info('release to share:        %s', release)
        log.info('report:                  %s', release / 'report.html')
        log.info('contact sheet (private): %s', private / 'contact_sheet.png')
    distributed.shutdown()
    return 0


if __name__ == '__main__':
    cli.run(main)
