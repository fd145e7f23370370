"""The stages that train the networks, each by the commands for it, and look at what they draw."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.pictures import load_pictures
from evaluation.probe import pooled_features
from evaluation.vessel_amount import vessel_ratios
from models.features.pretrained import load_feature_network
from models.psp import load_psp
from models.stylegan2 import load_generator
from stages.figures import JUDGE, distance_ratio, means, reconstruct, sheet
from stages.preparation import HELD_OUT, RELEASED, Command, cropped
from stages.runner import Finding, Outcome, Places, Stopped
from stages.settings import Request, channels
from utils.errors import UserError
from utils.images import shrink, to_uint8
from utils.io import load_weights
from utils.seeds import torch_generator

log = logging.getLogger(__name__)

ENCODER, GENERATOR = 'restyle.pt', 'generator.pt'
_MOST_JUDGED = 400  # photographs
_MOST_ERROR, _LEAST_VESSELS, _MOST_VESSELS, _MOST_DISTANCE = 0.5, 0.5, 2.0, 8.0
_LONGER = 'train longer (`hours`), or on more photographs'
_MAPPING_STEPS = 2000
# Of a training that goes on from weights: half to a third of a new one's rates, means from the
# first step, opponents sooner (measured in docs/training.md, 'Photographs').
_FURTHER = (
    '--learning_rate=1e-4',
    '--decoder_lr=6e-4',
    '--reading_lr=5e-4',
    '--adv_lr=5e-4',
    '--adv_start=300',
    '--n_means=3',
    '--mean_start=0',
)


class Commands(NamedTuple):
    """The commands behind the stages. make_release: with several processes, None in this one."""

    dataset_tool: Command
    new_generator: Command
    train_joint: Command
    fit_mapping: Command
    train_generator: Command
    train_encoder: Command
    make_release: Command | None = None


def run_command(command: Command, flags: list[str]) -> None:
    """Calls a command; Stopped when a signal stopped it in good order."""
    if code := command(flags):
        raise Stopped(code)


def vessel_findings(ratio: float, what: str, remedy: str) -> list[Finding]:
    """The amount of vessel in pictures over that in photographs, held from both sides."""
    sentence = f'Length of the vessels in {what}, over that in photographs.'
    return [
        Finding('vessels', ratio, _LEAST_VESSELS, True, sentence, remedy),
        Finding('vessels, not too many', ratio, _MOST_VESSELS, False, sentence, remedy),
    ]


def distance_finding(ratio: float, what: str, remedy: str) -> Finding:
    """The Fréchet distance of pictures in units of that among photographs."""
    return Finding(
        'distance',
        ratio,
        _MOST_DISTANCE,
        False,
        f'Fréchet distance ({JUDGE}) of {what} from photographs, over that of photographs among '
        'themselves.',
        remedy,
    )


def train_jointly(request: Request, steps: int, commands: Commands) -> Callable:
    """The stage that trains encoder and generator together."""

    def work(folder: Path, places: Places) -> Outcome:
        run, data = folder / 'joint', places['crop'] / RELEASED
        start, common = request.start, [f'--seed={request.seed}']
        if start is None:
            log.info('encoder and generator begin with nothing')
            start = folder / 'untrained.pt'
            if not start.exists():
                wide = [str(c) for c in channels(request.how.size)]
                flags = ['--channels', *wide, f'--dest={start}', *common]
                run_command(commands.new_generator, flags)
        flags = joint_flags(request, places['crop'], start, run, steps)
        run_command(commands.train_joint, [*flags, *_resume(run)])
        run_command(
            commands.fit_mapping,
            [
                f'--checkpoint_path={run / "checkpoints" / f"iteration_{steps}.pt"}',
                f'--data={data}',
                f'--dest={folder / ENCODER}',
                f'--steps={min(_MAPPING_STEPS, 10 * steps)}',
                f'--device={request.device}',
                *common,
            ],
        )
        return judge_encoder(request, folder, places, folder / ENCODER, run)

    return work


def joint_flags(request: Request, crops: Path, start: Path, run: Path, steps: int) -> list[str]:
    """The flags of a new training of encoder and generator together."""
    return [
        f'--exp_dir={run}',
        f'--train_path={crops / RELEASED}',
        f'--test_path={crops / HELD_OUT}',
        *(
            [f'--stylegan_weights={start}', '--learning_rate=2e-4']
            if request.start is None
            else [f'--checkpoint_path={start}', *_FURTHER]
        ),
        f'--encoder_size={request.how.size}',
        f'--batch_size={request.how.batch}',
        '--amp=bf16',
        '--no-mirror',
        f'--max_steps={steps}',
        f'--val_interval={max(1, min(250, steps // 4))}',
        '--progressive_start=1000000000',
        f'--device={request.device}',
        f'--seed={request.seed}',
    ]


def _resume(run: Path) -> list[str]:
    """The flag with which an encoder training goes on, if it has begun."""
    return ['--resume'] if (run / 'options.json').exists() else []


def train_generator(request: Request, steps: int, commands: Commands) -> Callable:
    """The stage that trains StyleGAN2-ADA on the cropped photographs."""

    def work(folder: Path, places: Places) -> Outcome:
        outdir, begun = folder / 'gan', sorted((folder / 'gan').glob('00000-*/options.json'))
        flags = (
            [f'--resume={begun[0].parent}']
            if begun and list(begun[0].parent.glob('network-snapshot-*.pt'))
            else generator_flags(request, places['crop'] / RELEASED, outdir, steps)
        )
        if begun and '--resume' not in flags[0]:
            shutil.rmtree(outdir)  # killed before its first snapshot
        run_command(commands.train_generator, flags)
        shutil.copyfile(next(outdir.glob(f'00000-*/{GENERATOR}')), folder / GENERATOR)
        return judge_generator(request, folder, places)

    return work


def generator_flags(request: Request, data: Path, outdir: Path, steps: int) -> list[str]:
    """The flags of a new generator training."""
    return [
        f'--outdir={outdir}',
        f'--data={data}',
        '--cfg=auto',
        '--mirror=0',
        '--gpus=1',
        f'--batch={request.how.batch}',
        f'--kimg={steps * request.how.batch / 1000:g}',
        f'--seed={request.seed}',
        f'--device={request.device}',
    ]


def judge_generator(request: Request, folder: Path, places: Places) -> Outcome:
    """Samples against photographs of people who were held out."""
    photographs = _photographs(places, HELD_OUT, request.how.size)
    generator, _ = load_generator(folder / GENERATOR)
    generator = generator.eval().to(request.device)
    z = torch.randn(len(photographs), generator.style_dim, generator=torch_generator(request.seed))
    with torch.no_grad():
        drawn = [
            to_uint8(shrink(generator(part.to(request.device)), request.how.size).clamp(-1, 1))
            for part in z.split(8)
        ]
    samples = torch.cat(drawn).cpu().numpy()
    sheet([photographs, samples], folder / 'samples.png')
    findings = [
        distance_finding(_distance(request, photographs, samples), 'samples', _LONGER),
        *vessel_findings(_vessels(photographs, samples), 'samples', _LONGER),
    ]
    return Outcome(findings, {'Photographs, samples of the generator': 'samples.png'}, [GENERATOR])


def train_encoder(request: Request, steps: int, commands: Commands) -> Callable:
    """The stage that trains a ReStyle encoder around a generator."""

    def work(folder: Path, places: Places) -> Outcome:
        run = folder / 'restyle'
        generator = request.generator_weights or places['generator'] / GENERATOR
        flags = encoder_flags(request, places['crop'], generator, run, steps)
        run_command(commands.train_encoder, [*flags, *_resume(run)])
        shutil.copyfile(run / 'checkpoints' / 'best_model.pt', folder / ENCODER)
        return judge_encoder(request, folder, places, folder / ENCODER, run)

    return work


def encoder_flags(
    request: Request, crops: Path, generator: Path, run: Path, steps: int
) -> list[str]:
    """The flags of a new encoder training."""
    return [
        f'--exp_dir={run}',
        f'--train_path={crops / RELEASED}',
        f'--test_path={crops / HELD_OUT}',
        f'--stylegan_weights={generator}',
        '--encoder_type=ResNetBackboneEncoder',
        f'--batch_size={request.how.batch}',
        '--start_from_latent_avg',
        '--l2_lambda=1',
        '--lpips_lambda=0.8',
        '--moco_lambda=0.5',
        '--content_weights=lite0',
        '--lpips_weights=lite0',
        '--no-mirror',
        f'--max_steps={steps}',
        f'--val_interval={max(1, min(5000, steps // 10))}',
        f'--seed={request.seed}',
        f'--device={request.device}',
    ]


def take_encoder(request: Request) -> Callable:
    """The stage in place of trainings: looks at an encoder that is given.

    Its lines do not bind: there is no training to go on with.
    """

    def work(folder: Path, places: Places) -> Outcome:
        if request.encoder_weights is None:
            raise ValueError('no encoder is given')
        shutil.copyfile(request.encoder_weights, folder / ENCODER)
        found = judge_encoder(request, folder, places, folder / ENCODER)
        other = 'take other weights, or leave them out and train'
        return found._replace(
            findings=[f._replace(binding=False, remedy=other) for f in found.findings]
        )

    return work


def refinements(encoder: Path) -> int:
    """How many refinements the encoder was trained with, as its file says; 5 if it does not."""
    opts = load_weights(encoder, what='ReStyle checkpoint').get('opts')
    return int((opts or {}).get('n_iters_per_batch', 5))


def judge_encoder(
    request: Request, folder: Path, places: Places, encoder: Path, run: Path | None = None
) -> Outcome:
    """Photographs of people who were held out, as the networks draw them alone and on average."""
    psp = load_psp(encoder)
    photographs = _photographs(places, HELD_OUT, psp.input_size)
    found = reconstruct(psp, photographs, refinements(encoder), request.device)
    drawn = means(psp, found.latents, request.k, request.device, request.seed)
    sheet([photographs, found.drawn], folder / 'reconstructions.png')
    sheet([drawn], folder / 'means.png')
    what = f'pictures of means of {request.k}'
    findings = [
        Finding(
            'error',
            found.error,
            _MOST_ERROR,
            False,
            'Squared error of reconstructed photographs of people held out, over that of the '
            'average photograph.',
            _LONGER,
        ),
        *vessel_findings(_vessels(photographs, drawn), what, _LONGER),
        distance_finding(_distance(request, photographs, drawn), what, _LONGER),
    ]
    pictures = {
        'Photographs of people held out, and their reconstructions below': 'reconstructions.png',
        f'Means of {request.k} people held out': 'means.png',
    }
    if run is not None and (run / 'curves.png').exists():
        pictures['Losses'] = f'{run.name}/curves.png'
    return Outcome(findings, pictures, [encoder.name])


def _photographs(places: Places, part: str, size: int) -> np.ndarray:
    paths = cropped(places, part).paths[:_MOST_JUDGED]
    if len(paths) < 4:
        raise UserError(f'{len(paths)} cropped photographs are held out; at least 4 are needed')
    return load_pictures(paths, size)


def _vessels(photographs: np.ndarray, drawn: np.ndarray) -> float:
    return vessel_ratios(photographs, drawn)['length']['value']


def _distance(request: Request, photographs: np.ndarray, drawn: np.ndarray) -> float:
    network = load_feature_network(JUDGE)
    real, fake = (pooled_features(network, p, device=request.device) for p in (photographs, drawn))
    return distance_ratio(real, fake, request.seed)
