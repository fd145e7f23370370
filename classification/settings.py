"""Settings of a grader's training and the YAML files that hold them."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from evaluation.probe import KINDS
from models.resnet import ARCHS
from utils.errors import UserError
from utils.kinds import (
    boolean,
    choice,
    fraction,
    list_of,
    nonnegative_float,
    nonnegative_int,
    number,
    positive_float,
    positive_int,
    text,
)
from utils.options import check, entries, option, read_entries

CONFIG_DIR = Path(__file__).resolve().parent / 'configs'

TARGETS = ('regression', '5-class', 'binary')
LABELS = ('majority', 'soft')
GRADERS = ('network', 'probe')
PRECISIONS = ('fp32', 'bf16', 'fp16')
SAMPLINGS = ('instance', 'class')
_COLOUR = list_of(nonnegative_float, 'a list of three numbers', length=3)


def is_timm_model(name: str) -> bool:
    """Whether timm can build the architecture `name`."""
    import timm  # slow to import, and most runs need none of it

    return timm.is_model(name)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one grader is trained. The defaults are the published ones where those are sound.

    arch: a ResNet of the published code, or any timm architecture.
    target: 'regression' of the grade (one output, squared error, published), '5-class'
    (cross-entropy) or 'binary' (grade >= positive_from, binary cross-entropy).
    small_stem: a 3x3 first convolution and no max-pool, for pictures below about 100 px.
    schedule: cosine over cosine_epochs until min_learning_rate, constant from there on.
    sampling: 'instance' draws every picture once per epoch; 'class' draws grades evenly.
    min_steps_per_epoch: sets too small for that many batches are gone through several times per
    epoch, so that small and large sets get comparable numbers of steps.
    mean, std: of the colour channels in [0, 1]; None computes them from the training pictures.
    Augmentation: probabilities of the mirrorings; brightness and contrast factors from
    1 - x to 1 + x; rotation up to that many degrees; translation up to that share of the side.
    """

    target: str = option('regression', choice(*TARGETS), 'what the grader predicts')
    n_classes: int = option(5, positive_int)
    positive_from: int = option(2, positive_int)
    arch: str = option(
        'resnet50', text, f'network: {", ".join(ARCHS)}, or any timm architecture', metavar='NAME'
    )
    small_stem: bool = option(False, boolean)
    image_size: int = option(512, positive_int, 'side of the pictures', metavar='PX')
    epochs: int = option(61, positive_int, 'epochs', metavar='INT')
    batch_size: int = option(32, positive_int, 'pictures per step', metavar='INT')
    min_steps_per_epoch: int = option(0, nonnegative_int)
    learning_rate: float = option(1e-3, positive_float)
    momentum: float = option(0.9, fraction)
    weight_decay: float = option(5e-4, nonnegative_float)
    cosine_epochs: int = option(25, positive_int)
    min_learning_rate: float = option(1e-4, nonnegative_float)
    eval_interval: int = option(1, positive_int)
    sampling: str = option('instance', choice(*SAMPLINGS))
    precision: str = option('fp32', choice(*PRECISIONS), 'of the network')
    mean: tuple | None = option(None, _COLOUR)
    std: tuple | None = option(None, _COLOUR)
    horizontal_flip: float = option(0.5, fraction)
    vertical_flip: float = option(0.5, fraction)
    brightness: float = option(0.2, nonnegative_float)
    contrast: float = option(0.2, nonnegative_float)
    rotation: float = option(180.0, nonnegative_float)
    translation: float = option(0.2, fraction)

    def __post_init__(self) -> None:
        check(self)
        if self.arch not in ARCHS and not is_timm_model(self.arch):
            raise UserError(
                f'arch: {self.arch!r} is none of {", ".join(ARCHS)} and no '
                'architecture of timm (timm.list_models() names them)'
            )
        if not 0 < self.positive_from < self.n_classes:
            raise UserError(
                f'positive_from: {self.positive_from} must lie between 1 and {self.n_classes - 1}'
            )
        if (self.mean is None) != (self.std is None):
            raise UserError('mean and std go together: give both, or neither')


@dataclasses.dataclass(frozen=True)
class Config:
    """A YAML file: the grader's settings and how runs with it are made.

    grader: 'network' is trained as `settings` say; 'probe' is linear models on the frozen
    features of a pretrained network (evaluation/probe.py), in seconds, of which image_size alone
    of the settings counts. features: 'lite0', 'lite1', 'lite2', or a weight file of the timm
    architecture features_arch. probe: 'logistic' or 'ridge' regression of the referable share.
    labels: 'majority' or 'soft' (train against the shares of the grades in a group).
    initial_weights: where the network starts: '' at random, or what `build_grader` reads.
    validation_fraction: share of the training pictures set apart to choose the epoch.
    """

    settings: Settings
    grader: str = option(
        'network',
        choice(*GRADERS),
        'train a network, or fit linear models on frozen features (seconds)',
    )
    features: str = option(
        'lite1', text, 'network of the probe: lite0, lite1, lite2, or a weight file', metavar='NAME'
    )
    features_arch: str = option('', text, 'timm architecture of that file', metavar='NAME')
    probe: str = option('logistic', choice(*KINDS))
    labels: str = option('majority', choice(*LABELS), 'majority grade, or shares of the grades')
    initial_weights: str = option(
        '',
        text,
        "weights to start from: of a ResNet torchvision's or a content encoder; of a timm "
        'architecture its file, or lite0, lite1, lite2 (default: random weights)',
        metavar='FILE',
        flag='imagenet_weights',
    )
    seeds: tuple = option((0, 1, 2), list_of(nonnegative_int, 'a list of whole numbers'))
    validation_fraction: float = option(
        0.1, number(lambda v: 0 < v < 1, 'a number between 0 and 1, neither of them')
    )
    save_path: str = option('runs/classification', text)

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """A flat dict, as in the YAML file."""
        return entries(self)


def find_config(name: str | Path) -> Path:
    """The path of a configuration: as given, or by its file name among the project's own."""
    path = Path(name)
    if path.is_file():
        return path
    if (CONFIG_DIR / path.name).is_file():
        return CONFIG_DIR / path.name
    known = ', '.join(sorted(p.name for p in CONFIG_DIR.glob('*.yaml')))
    raise UserError(f'-config {name}: no such file; the project has {known}')


def load_config(path: str | Path, **overrides: Any) -> Config:
    """Reads a flat YAML file; `overrides` that are not None replace its entries.

    UserError for broken YAML, and for unknown entries or values of the wrong type.
    """
    path = find_config(path)
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not readable YAML: {error}') from error
    if not isinstance(values, dict):
        raise UserError(f'{path} must hold lines of the form `name: value`')
    values |= {k: v for k, v in overrides.items() if v is not None}
    return read_entries(Config, values, str(path))
