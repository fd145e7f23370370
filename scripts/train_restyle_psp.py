"""Trains the ReStyle-pSp encoder that finds the latents of photographs.

    python scripts/train_restyle_psp.py --dataset_type=aptos_encode \\
        --encoder_type=ResNetBackboneEncoder --exp_dir=runs/restyle --output_size=512 \\
        --workers=8 --batch_size=8 --test_batch_size=8 --test_workers=8 --val_interval=5000 \\
        --save_interval=10000 --start_from_latent_avg --lpips_lambda=0.8 --l2_lambda=1 \\
        --moco_lambda=0.5 --w_norm_lambda=0 --id_lambda=0 --input_nc=6 --n_iters_per_batch=5 \\
        --stylegan_weights=runs/gan/generator.pt

A small run on a CPU:

    python scripts/train_restyle_psp.py --exp_dir=runs/restyle64 --train_path=train/ \\
        --test_path=test/ --stylegan_weights=generator.pt --encoder_type=LightEncoder \\
        --encoder_size=64 --l2_lambda=1 --amp=bf16 --max_steps=5000

Several processes: torchrun --nproc_per_node=N scripts/train_restyle_psp.py ... --batch_size counts
the images of a step over all of them. The same command with --resume goes on where a run stopped.

In --exp_dir: checkpoints/best_model.pt and iteration_<step>.pt (for the other scripts),
checkpoints/state_<step>.pt (for --resume), avg_image.png, logs/ (TensorBoard, sample sheets),
stats.jsonl and curves.png with the losses after every refinement.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

from configs.data_configs import DATASETS
from configs.paths_config import model_paths
from criteria.w_norm import latent_norm
from datasets.images_dataset import ImagesDataset
from models.encoders import (
    ENCODERS,
    LiteEncoder,
    build_encoder,
    init_from_lite0,
    init_from_resnet34,
    load_resnet34,
)
from models.features.pretrained import weight_file
from models.psp import PSP, psp_from_checkpoint
from models.stylegan2 import load_generator
from training.coach_restyle_psp import AMP_DTYPES, Coach, CoachConfig
from training.reconstruction import ContentTerm, L2Term, LpipsTerm
from training.run import finish
from utils import cli, distributed
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import setup_logging
from utils.runs import run_record, start_run
from utils.seeds import seed_everything, torch_generator
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

DEFAULT_ENCODER = 'ResNetBackboneEncoder'

# Flags that may differ when a run goes on: they do not change what is computed, or the content
# of the files they name is compared instead.
_FREE = (
    'exp_dir',
    'train_path',
    'test_path',
    'stylegan_weights',
    'checkpoint_path',
    'content_weights',
    'lpips_weights',
    'resnet34_weights',
    'workers',
    'test_workers',
    'test_batch_size',
    'device',
    'resume',
    'max_steps',
    'max_minutes',
    'keep_states',
    'image_interval',
    'board_interval',
    'save_interval',
)
_PATHS = (
    'exp_dir',
    'train_path',
    'test_path',
    'stylegan_weights',
    'checkpoint_path',
    'content_weights',
    'lpips_weights',
    'resnet34_weights',
    'resume',
)


def build_parser(
    doc: str = __doc__, encoders: Iterable[str] = ENCODERS, default_encoder: str = DEFAULT_ENCODER
) -> argparse.ArgumentParser:
    """The flags of an encoder training; doc: what its script says of itself."""
    p = cli.parser(doc.splitlines()[0], '\n'.join(doc.splitlines()[1:]))
    g = p.add_argument_group('required')
    g.add_argument('--exp_dir', type=Path, required=True, metavar='DIR', help='run folder')
    g.add_argument(
        '--stylegan_weights',
        type=Path,
        metavar='FILE',
        help='generator file (required unless --checkpoint_path is given)',
    )
    g = p.add_argument_group('data')
    g.add_argument(
        '--dataset_type',
        default='my_data_encode',
        choices=sorted(DATASETS),
        help='entry of configs/data_configs.py',
    )
    g.add_argument(
        '--train_path',
        type=Path,
        metavar='DIR|ZIP',
        help="training photographs, in place of the entry's",
    )
    g.add_argument(
        '--test_path',
        type=Path,
        metavar='DIR|ZIP',
        help="validation photographs, in place of the entry's",
    )
    g.add_argument(
        '--mirror',
        action=argparse.BooleanOptionalAction,
        default=None,
        help='mirror half of the training photographs (default: as the entry says)',
    )
    g.add_argument(
        '--workers',
        type=cli.nonnegative_int,
        default=4,
        metavar='N',
        help='loading processes (sets that fit 2 GB are kept in memory instead)',
    )
    g.add_argument(
        '--test_workers',
        type=cli.nonnegative_int,
        default=2,
        metavar='N',
        help='the same for validation',
    )
    g = p.add_argument_group('networks')
    g.add_argument(
        '--encoder_type',
        choices=sorted(encoders),
        help=f'encoder class (default: {default_encoder})',
    )
    g.add_argument(
        '--encoder_size',
        type=cli.positive_int,
        metavar='PX',
        help="side of the encoder's input and of the losses (default: 256)",
    )
    g.add_argument(
        '--light_width',
        type=cli.positive_int,
        default=64,
        metavar='N',
        help='channels of the first feature map of a Light encoder',
    )
    g.add_argument(
        '--input_nc',
        type=int,
        default=6,
        metavar='N',
        help='encoder input channels: photograph and reconstruction, always 6',
    )
    g.add_argument(
        '--output_size',
        type=cli.power_of_two,
        metavar='PX',
        help='generator size; checked against the weights',
    )
    g.add_argument(
        '--checkpoint_path',
        type=Path,
        metavar='FILE',
        help='start from encoder, generator and latent average of this checkpoint '
        '(a warm start, not a resume)',
    )
    g.add_argument(
        '--resnet34_weights',
        type=Path,
        metavar='FILE',
        help='torchvision ImageNet ResNet-34 to start ResNet encoders from (default: '
        "model_paths['resnet34'] when that file exists, else a random start)",
    )
    g.add_argument(
        '--train_decoder',
        type=cli.boolean,
        nargs='?',
        const=True,
        default=False,
        metavar='BOOL',
        help='train the generator too',
    )
    g.add_argument(
        '--synthetic',
        type=cli.fraction,
        default=0.0,
        metavar='SHARE',
        help='share of every batch that the generator draws, with known latents: 1 to '
        'pretrain, then 0.5 with --checkpoint_path',
    )
    g = p.add_argument_group('losses')
    for name, text in (
        ('l2', 'mean squared error'),
        ('lpips', 'LPIPS (needs AlexNet weights)'),
        ('moco', 'content loss (needs MoCo v2 or content encoder weights)'),
        ('w_norm', 'latent norm'),
        ('id', 'face identity; retinas have none, so only 0 is possible'),
    ):
        g.add_argument(
            f'--{name}_lambda',
            type=cli.nonnegative_float,
            default=0.0,
            metavar='WEIGHT',
            help=f'weight of the {text}',
        )
    g.add_argument(
        '--latent_lambda',
        type=cli.nonnegative_float,
        default=0.1,
        metavar='WEIGHT',
        help='weight of the distance from the known latents of --synthetic',
    )
    g.add_argument(
        '--start_from_latent_avg',
        action='store_true',
        help='the latent norm counts from the average latent',
    )
    g.add_argument(
        '--content_weights',
        '--moco_weights',
        dest='content_weights',
        type=Path,
        metavar='FILE|lite0',
        help='MoCo v2 ResNet-50 file, an encoder made by '
        'scripts/train_content_encoder.py, or an installed network: lite0, lite1, '
        "lite2 (default: model_paths['moco'])",
    )
    g.add_argument(
        '--lpips_weights',
        type=Path,
        metavar='FILE|lite0',
        help='torchvision AlexNet file, or an installed network, lite0 and its kin, '
        "with a distance like LPIPS (default: model_paths['alexnet'])",
    )
    g = p.add_argument_group('training')
    g.add_argument(
        '--max_steps',
        type=cli.positive_int,
        default=100_000,
        metavar='STEPS',
        help='optimiser steps',
    )
    g.add_argument(
        '--batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='images per optimiser step, all processes together',
    )
    g.add_argument(
        '--test_batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='images per validation batch and process',
    )
    g.add_argument(
        '--accumulate',
        type=cli.positive_int,
        default=1,
        metavar='PASSES',
        help="split each process's share of a batch to save memory",
    )
    g.add_argument(
        '--n_iters_per_batch',
        type=cli.positive_int,
        default=5,
        metavar='N',
        help='refinements per batch',
    )
    g.add_argument(
        '--learning_rate',
        type=cli.positive_float,
        default=1e-4,
        metavar='RATE',
        help='constant learning rate',
    )
    g.add_argument('--optim_name', choices=('ranger', 'adam'), default='ranger', help='optimiser')
    g.add_argument(
        '--amp',
        choices=sorted(AMP_DTYPES),
        default='no',
        help='mixed precision: bf16 (CPU or GPU) or fp16 (GPU)',
    )
    g.add_argument(
        '--n_clusters', type=int, metavar='N', help='accepted for old command lines; has no effect'
    )
    cli.add_common(g)
    g = p.add_argument_group('records')
    g.add_argument(
        '--image_interval',
        type=cli.positive_int,
        default=100,
        metavar='STEPS',
        help='training sample sheets',
    )
    g.add_argument(
        '--board_interval',
        type=cli.positive_int,
        default=50,
        metavar='STEPS',
        help='training losses',
    )
    g.add_argument(
        '--val_interval',
        type=cli.positive_int,
        default=1000,
        metavar='STEPS',
        help='validation, best_model.pt and resumable state',
    )
    g.add_argument(
        '--save_interval',
        type=cli.positive_int,
        metavar='STEPS',
        help='iteration_<step>.pt (default: only the last step)',
    )
    g.add_argument(
        '--half_export',
        action='store_true',
        help="store the encoder's weights in best_model.pt and iteration_<step>.pt as float16",
    )
    g.add_argument(
        '--keep_states', type=cli.positive_int, default=2, metavar='N', help='resumable states kept'
    )
    g.add_argument(
        '--resume',
        nargs='?',
        const='newest',
        metavar='FILE',
        help='go on from the newest state in --exp_dir, or from a state file',
    )
    g.add_argument(
        '--max_minutes',
        type=cli.positive_float,
        metavar='MIN',
        help='stop in good order after that time; go on with --resume',
    )
    return p


def check_options(opts):
    if opts.id_lambda > 0 and opts.moco_lambda > 0:
        raise UserError('--id_lambda and --moco_lambda exclude each other; set one of them to 0')
    if opts.id_lambda > 0:
        raise UserError(
            '--id_lambda: the identity loss compares faces, and photographs of the '
            'retina have none; set it to 0 and use --moco_lambda'
        )
    if not opts.l2_lambda and not opts.lpips_lambda and not opts.moco_lambda:
        raise UserError(
            'no reconstruction loss: set --l2_lambda, --lpips_lambda or '
            '--moco_lambda (published: 1, 0.8 and 0.5)'
        )
    if opts.input_nc != 6:
        raise UserError(
            f'--input_nc {opts.input_nc}: the encoder sees the photograph and the '
            'current reconstruction, 6 channels'
        )
    if not opts.stylegan_weights and not opts.checkpoint_path:
        raise UserError('--stylegan_weights or --checkpoint_path is required')


def data_roots(opts):
    """(training, validation) paths from the flags or the entry of --dataset_type."""
    entry = DATASETS[opts.dataset_type]
    roots = []
    for part, given in (('train', opts.train_path), ('test', opts.test_path)):
        source, target = entry[f'{part}_source_root'], entry[f'{part}_target_root']
        if given is None and source != target:
            raise UserError(
                f'{opts.dataset_type}: {part}_source_root and {part}_target_root '
                'differ; the encoder is trained to draw what it sees'
            )
        if given is None and source is None:
            raise UserError(
                f'no {part} photographs: give --{part}_path, or set the path of '
                f'{opts.dataset_type} in configs/paths_config.py'
            )
        roots.append(Path(given or source))
    return roots


def build_psp(opts: argparse.Namespace, default_encoder: str) -> PSP:
    """Networks from --checkpoint_path or new ones around --stylegan_weights."""
    if opts.checkpoint_path:
        checkpoint = load_weights(opts.checkpoint_path, what='ReStyle-pSp checkpoint')
        psp = psp_from_checkpoint(checkpoint, source=str(opts.checkpoint_path))
        name = type(psp.encoder).__name__
        for flag, given, found in (
            ('encoder_type', opts.encoder_type, name),
            ('encoder_size', opts.encoder_size, psp.input_size),
        ):
            if given not in (None, found):
                raise UserError(
                    f'--{flag} {given}: the encoder in {opts.checkpoint_path} has {found}'
                )
        check_size(opts, psp.decoder.size, opts.checkpoint_path)
        return psp
    decoder, latent_avg = load_generator(opts.stylegan_weights)
    check_size(opts, decoder.size, opts.stylegan_weights)
    seed_everything(opts.seed, 'encoder')
    name = opts.encoder_type or default_encoder
    options = {'width': opts.light_width} if name.startswith('Light') else {}
    try:
        encoder = build_encoder(
            name,
            n_styles=decoder.n_latent,
            style_dim=decoder.style_dim,
            input_size=opts.encoder_size or 256,
            **options,
        )
    except ValueError as error:
        raise UserError(f'--encoder_size: {error}') from error
    start_from_imagenet(encoder, opts)
    if latent_avg is None:
        latent_avg = decoder.mean_latent()
    return PSP(encoder, decoder, latent_avg, opts.encoder_size or 256)


def check_size(opts, size, path):
    if opts.output_size not in (None, size):
        raise UserError(
            f'--output_size {opts.output_size}: the generator in {path} makes {size} px'
        )


def start_from_imagenet(encoder, opts):
    if isinstance(encoder, LiteEncoder):
        init_from_lite0(encoder, generator=torch_generator(opts.seed, 'stem'))
        return
    configured = Path(model_paths['resnet34'])
    if opts.resnet34_weights is None and 'ResNet' in type(encoder).__name__:
        if configured.is_file():
            opts.resnet34_weights = configured
        else:
            log.warning('no ImageNet weights (--resnet34_weights); the encoder starts at random')
    if opts.resnet34_weights is not None:
        init_from_resnet34(
            encoder,
            load_resnet34(opts.resnet34_weights),
            generator=torch_generator(opts.seed, 'stem'),
            source=opts.resnet34_weights,
        )


def build_losses(opts, device):
    """{name: (term, weight)} of the reconstruction losses that are on."""
    losses = {}
    if opts.l2_lambda:
        losses['l2'] = L2Term(), opts.l2_lambda
    if opts.lpips_lambda:
        losses['lpips'] = LpipsTerm(opts.lpips_weights, device), opts.lpips_lambda
    if opts.moco_lambda:
        losses['moco'] = ContentTerm(opts.content_weights, device), opts.moco_lambda
    return losses


def used(weights: Path, weight: float) -> Path | None:
    """The file of a loss's network, None when the loss is off."""
    return weight_file(weights) if weight else None


def coach_config(opts: argparse.Namespace) -> CoachConfig:
    return CoachConfig(
        batch_size=opts.batch_size,
        test_batch_size=opts.test_batch_size,
        learning_rate=opts.learning_rate,
        optim_name=opts.optim_name,
        train_decoder=opts.train_decoder,
        n_iters=opts.n_iters_per_batch,
        max_steps=opts.max_steps,
        image_interval=opts.image_interval,
        board_interval=opts.board_interval,
        val_interval=opts.val_interval,
        save_interval=opts.save_interval,
        accumulate=opts.accumulate,
        amp=opts.amp,
        mirror=opts.mirror,
        half_export=opts.half_export,
        seed=opts.seed,
        synthetic=opts.synthetic,
        latent_lambda=opts.latent_lambda,
    )


def train(
    opts: argparse.Namespace,
    make_coach: Callable[..., Coach] = Coach,
    default_encoder: str = DEFAULT_ENCODER,
) -> int:
    """Runs the training of `opts` with the Coach that `make_coach` builds; returns 0."""
    setup_logging()
    check_options(opts)
    train_path, test_path = data_roots(opts)
    opts.lpips_weights = opts.lpips_weights or Path(model_paths['alexnet'])
    opts.content_weights = opts.content_weights or Path(model_paths['moco'])
    device = distributed.init(cli.resolve_device(opts.device))
    losses = build_losses(opts, device)
    psp = build_psp(opts, default_encoder)
    opts.encoder_type, opts.encoder_size = type(psp.encoder).__name__, psp.input_size
    opts.output_size = psp.decoder.size
    if opts.mirror is None:
        opts.mirror = DATASETS[opts.dataset_type]['transforms'].mirror
    train_set = ImagesDataset(train_path, psp.input_size)
    test_set = ImagesDataset(test_path, psp.input_size)
    penalty = None
    if opts.w_norm_lambda:
        average = psp.latent_avg.to(device) if opts.start_from_latent_avg else None
        penalty = latent_norm(average), opts.w_norm_lambda
    coach = make_coach(
        psp,
        train_set,
        test_set,
        coach_config(opts),
        run_dir=opts.exp_dir,
        losses=losses,
        device=device,
        latent_penalty=penalty,
        meta={k: v for k, v in vars(opts).items() if k not in _PATHS},
        workers=0 if train_set.cached else opts.workers,
        test_workers=0 if test_set.cached else opts.test_workers,
        keep_states=opts.keep_states,
    )
    if distributed.is_main():
        record = run_record(
            {
                **vars(opts),
                'train_images': f'{len(train_set)} images, {train_set.digest()}',
                'test_images': f'{len(test_set)} images, {test_set.digest()}',
            },
            inputs={
                'stylegan_weights': None if opts.checkpoint_path else opts.stylegan_weights,
                'checkpoint_path': opts.checkpoint_path,
                'resnet34_weights': opts.resnet34_weights,
                'lpips_weights': used(opts.lpips_weights, opts.lpips_lambda),
                'content_weights': used(opts.content_weights, opts.moco_lambda),
            },
            seed=opts.seed,
        )
        start_run(
            opts.exp_dir,
            record,
            resume=opts.resume is not None,
            free_options=_FREE,
            resume_flag='--resume',
        )
        setup_logging(opts.exp_dir / 'log.txt')
    distributed.barrier()
    if opts.resume is not None:
        coach.resume(None if opts.resume == 'newest' else Path(opts.resume))
    log.info(
        '%d training and %d validation images of %d px, generator %d px, %s, batch %d on %d '
        'process(es), %s',
        len(train_set),
        len(test_set),
        psp.input_size,
        psp.decoder.size,
        opts.encoder_type,
        opts.batch_size,
        distributed.world_size(),
        device,
    )
    with stop_on_signal() as signalled:
        done = coach.train(max_minutes=opts.max_minutes, should_stop=signalled)
    log.info(
        '%s after %d steps; checkpoints in %s',
        'finished' if done else 'stopped',
        coach.step_count,
        opts.exp_dir / 'checkpoints',
    )
    return finish(signalled)


def main(argv: Sequence[str] | None = None) -> int:
    return train(build_parser().parse_args(argv))


if __name__ == '__main__':
    cli.run(main)
