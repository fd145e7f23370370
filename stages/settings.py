"""What is asked of the whole way from photographs to a release, and what a preset means."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anonymization.calibrated import EPSILON
from anonymization.optimize import OptimizeConfig
from models.features.guide import load_guide
from models.features.pretrained import load_feature_network, wheel_file
from models.psp import load_psp
from stages.figures import JUDGE
from utils.errors import UserError
from utils.io import write_json
from utils.kinds import (
    Kind,
    choice,
    fraction,
    nonnegative_int,
    path,
    path_or,
    positive_float,
    positive_int,
    power_of_two,
)
from utils.options import check, option
from utils.runs import PROJECT_ROOT

_CHANNELS = (256, 256, 256, 96, 48, 16, 8)  # of the small generator at 4, 8, ... px
_BATCH = 8
STYLE_DIM = 512  # of all generators that are trained here
# Encoder and generator of drawn eyes, from which those of photographs are learnt sooner.
_START = PROJECT_ROOT / 'pretrained_models' / 'demo' / 'restyle128.pt'
_START_SIZE = 128
_GROW = 'scripts/grow_restyle.py doubles it, `none` begins with nothing'


class Preset(NamedTuple):
    """size: of the pictures. joint: encoder and generator are trained together.

    batch: photographs of a training step. image_passes: what a photograph costs in the training,
    in passes through Lite0. release_steps: of the optimisation of a group. latent_rank: in how
    many leading directions of the generator's latents a group is told, 0: in all.
    """

    size: int
    joint: bool
    batch: int
    image_passes: float
    release_steps: int
    latent_rank: int


# image_passes of `small` is measured at 128 px, and so is what a release gives and gives away
# without steps in eight directions (docs/training.md); image_passes of the others is a guess.
PRESETS = {
    'small': Preset(128, True, 10, 6.0, 0, 8),
    'gpu256': Preset(256, False, 8, 20.0, 60, 0),
    'gpu512': Preset(512, False, 8, 40.0, 60, 0),
}
GROUP_PASSES = 11.0  # of a step of one group
READ_SECONDS = 0.3  # of a photograph: check and crop
TRAINING_SHARE = 0.8  # of the hours
_LENGTHS = 'lengths and weights'


def _length(kind: Kind, help: str, metavar: str) -> Any:
    return option(None, kind, help, group=_LENGTHS, metavar=metavar)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for.

    photos, labels: photographs and their table. k: fewest people in a group. size: side in pixels,
    None: the preset's. hours: for everything. held_out: share of the people who are neither trained
    on nor released, and test both. steps: of the (last) training, None: what the hours allow.
    release_steps, latent_rank: None: the preset's, see there. epsilon: of anonymization.calibrated,
    with networks of other people alone. generator_weights, encoder_weights:
    files in place of trainings. start_weights: what the training of encoder and generator together
    goes on from; 'auto': the project's own weights, which have seen phantoms only, at their size;
    'none': nothing. guide: file of models.features.guide for the release. processes: of
    the trainings and the release, None: one for each GPU.
    """

    photos: Path = option(kind=path, help='folder of the photographs', metavar='DIR')
    labels: Path = option(kind=path, help='their table: ids, grades, patients', metavar='CSV')
    out_dir: Path = option(kind=path, help='private output folder', metavar='DIR', flag='out')
    k: int = option(5, positive_int, 'fewest people in a group', metavar='K')
    size: int | None = option(
        None, power_of_two, "side of the pictures (default: preset's)", metavar='PX'
    )
    preset: str = option(
        'small',
        choice(*sorted(PRESETS)),
        'small: CPU, 128 px; gpu256, gpu512: StyleGAN2-ADA and ReStyle on one GPU',
    )
    hours: float = option(8.0, positive_float, 'for everything, roughly', metavar='H')
    held_out: float = option(
        0.2,
        fraction,
        'of the people, to test networks and release; they are in neither',
        metavar='SHARE',
    )
    seed: int = option(0, nonnegative_int, 'random seed', metavar='INT')
    steps: int | None = option(
        None,
        positive_int,
        'of each training (default: what --hours allow, from a short measurement)',
        group=_LENGTHS,
        metavar='N',
    )
    release_steps: int | None = _length(nonnegative_int, "per group (default: preset's)", 'N')
    latent_rank: int | None = _length(
        nonnegative_int,
        "tell a group in so many leading directions of the generator's latents, 0: in all "
        "(default: preset's)",
        'N',
    )
    epsilon: float | None = _length(
        EPSILON, 'secret noise on these directions, for differential privacy', 'FLOAT'
    )
    generator_weights: Path | None = _length(path, 'in place of that training', 'FILE')
    encoder_weights: Path | None = _length(
        path, 'ReStyle checkpoint, in place of all trainings', 'FILE'
    )
    start_weights: Path | str = option(
        'auto',
        path_or('auto', 'none'),
        "ReStyle checkpoint from which the training of `small` starts; auto: the project's, "
        'which has seen drawn eyes only, at 128 px; none: from nothing',
        group=_LENGTHS,
        metavar='FILE|auto|none',
    )
    processes: int | None = _length(
        positive_int,
        'of each training and of the release, at most, on this machine (default: one for each GPU)',
        'N',
    )
    guide: Path | None = _length(path, 'of the content loss, for the release', 'FILE')
    device: torch.device = torch.device('cpu')

    @property
    def how(self) -> Preset:
        """The preset with the size, steps and directions that were asked for."""
        asked = {name: getattr(self, name) for name in ('size', 'release_steps', 'latent_rank')}
        return PRESETS[self.preset]._replace(**{k: v for k, v in asked.items() if v is not None})

    @property
    def told(self) -> dict[str, float]:
        """How the release tells a group."""
        given = {} if self.epsilon is None else {'epsilon': self.epsilon}
        return {'steps': self.how.release_steps, 'latent_rank': self.how.latent_rank, **given}

    @property
    def start(self) -> Path | None:
        """The checkpoint from which encoder and generator are trained together, or None."""
        if isinstance(self.start_weights, Path):
            return self.start_weights
        known = self.how.joint and self.how.size == _START_SIZE
        return _START if known and self.start_weights == 'auto' else None

    @property
    def world(self) -> int:
        """Processes of the trainings and the release: as many as share a batch evenly."""
        several = self.device.type == 'cuda' and self.device.index is None
        most = self.processes or (torch.cuda.device_count() if several else 1)
        return max(n for n in range(1, most + 1) if self.how.batch % n == 0)

    def check(self) -> None:
        """UserError for what does not go together, before anything is read."""
        check(self)
        size = self.how.size
        if size & (size - 1) or not 64 <= size <= 1024:
            raise UserError(f'`size` {size}: use a power of two from 64 to 1024')
        if self.how.joint and size > 256 and not self.encoder_weights:
            raise UserError(f'`size` {size}: `preset` small trains up to 256 px; use gpu512')
        if self.k < 2:
            raise UserError(f'`k` {self.k}: use 2 or more')
        if not 0 < self.held_out < 1:
            raise UserError(f'`held_out` {self.held_out}: use a share between 0 and 1')
        if self.generator_weights and self.encoder_weights:
            raise UserError(
                '`generator_weights` and `encoder_weights`: the encoder file holds its generator; '
                'give one of them'
            )
        if self.generator_weights and self.how.joint:
            raise UserError(
                '`generator_weights`: `preset` small trains encoder and generator together; give '
                '`encoder_weights`, or another preset'
            )
        if self.start_weights != 'auto' and (self.encoder_weights or not self.how.joint):
            raise UserError('`start_weights`: only the training of `preset` small starts from them')
        for name in ('labels', 'generator_weights', 'encoder_weights', 'start_weights', 'guide'):
            file = getattr(self, name)
            if isinstance(file, Path) and not file.is_file():
                raise UserError(f'`{name}` {file}: no such file')
        wheel_file(JUDGE)  # a stage far down the way needs it
        self._check_release()
        if not self.photos.is_dir():
            raise UserError(f'`photos` {self.photos}: no such folder')

    def _check_release(self) -> None:
        """UserError for weights and settings that only a late stage would meet."""
        style_dim = STYLE_DIM
        if given := self.encoder_weights or (self.how.joint and self.start):
            psp = load_psp(given)
            style_dim = psp.decoder.style_dim
            name = 'encoder_weights' if self.encoder_weights else 'start_weights'
            size = self.size if self.encoder_weights else self.how.size
            if size not in (None, psp.decoder.size):
                other = 'leave `size` out, or take others'
                raise UserError(
                    f'`{name}` {given}: its generator draws {psp.decoder.size} px, and `size` is '
                    f'{size}; {other if self.encoder_weights else _GROW}'
                )
        OptimizeConfig(latent_rank=self.how.latent_rank).check_rank(style_dim)
        if self.epsilon and (self.how.release_steps or not self.how.latent_rank):
            raise UserError(
                '`epsilon` needs `latent_rank` above 0, and `release_steps` 0: steps look at the '
                'photographs again'
            )
        if self.epsilon and not self.encoder_weights:
            raise UserError(
                '`epsilon` needs `encoder_weights` of other people: no noise covers what networks '
                'keep of those they are trained on'
            )
        if self.guide and not self.how.release_steps:
            raise UserError(
                '`guide`: it steers the steps of the release, and there are none; leave it out, or '
                'set `release_steps`'
            )
        if self.guide:
            network = load_feature_network('lite0')
            load_guide(self.guide, n_features=network.n_features, digest=network.digest)


def channels(size: int) -> list[int]:
    """Channels of the small generator, from 4 px to `size`."""
    return list(_CHANNELS[: size.bit_length() - 2])


def pass_seconds(size: int, device: torch.device) -> float:
    """Seconds that a picture of `size` takes through Lite0 and back, of one core or the GPU."""
    net = load_feature_network('lite0').to(device)
    x = torch.zeros(_BATCH, 3, size, size, device=device, requires_grad=True)
    clock = time.perf_counter if device.type == 'cuda' else time.process_time
    best = float('inf')
    for _ in range(3):
        started = clock()
        net.pooled(x).sum().backward()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return best / _BATCH


class Pace(NamedTuple):
    """seconds: of a picture through Lite0 and back. steps: what the hours allow a training."""

    seconds: float
    steps: int


def pace(request: Request) -> Pace:
    """Measured once for an output folder, a size and the hours, and kept in pace.json.

    So a run that goes on trains as long as it was to at first, whatever else the machine does.
    """
    how, file = request.how, request.out_dir / 'pace.json'
    name = f'{request.preset} {how.size} px {request.hours:g} hours {request.device.type}'
    known = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    if name not in known:
        seconds = pass_seconds(how.size, request.device)
        trainings = 1 if how.joint or request.generator_weights else 2
        image = seconds * how.image_passes
        steps = 3600 * request.hours * TRAINING_SHARE / trainings / (image * how.batch)
        known[name] = [seconds, _two_digits(steps)]
        write_json(file, known)
    seconds, steps = known[name]
    return Pace(seconds, request.steps or steps)


def _two_digits(steps: float) -> int:
    return max(100, int(float(f'{steps:.1e}')))
