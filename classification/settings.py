"""Settings of a grader's training and the YAML files that hold them."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from evaluation.probe import KINDS
from models.resnet import ARCHS
from utils.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent / 'configs'

TARGETS = ('regression', '5-class', 'binary')
LABELS = ('majority', 'soft')
GRADERS = ('network', 'probe')
PRECISIONS = ('fp32', 'bf16', 'fp16')
SAMPLINGS = ('instance', 'class')


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

    target: str = 'regression'
    n_classes: int = 5
    positive_from: int = 2
    arch: str = 'resnet50'
    small_stem: bool = False
    image_size: int = 512
    epochs: int = 61
    batch_size: int = 32
    min_steps_per_epoch: int = 0
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cosine_epochs: int = 25
    min_learning_rate: float = 1e-4
    eval_interval: int = 1
    sampling: str = 'instance'
    precision: str = 'fp32'
    mean: tuple | None = None
    std: tuple | None = None
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    rotation: float = 180.0
    translation: float = 0.2

    def __post_init__(self) -> None:
        for name, choices in (
            ('target', TARGETS),
            ('precision', PRECISIONS),
            ('sampling', SAMPLINGS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f'{name}: {getattr(self, name)!r} is none of {", ".join(choices)}')
        if self.arch not in ARCHS and not is_timm_model(self.arch):
            raise UserError(
                f'arch: {self.arch!r} is none of {", ".join(ARCHS)} and no '
                'architecture of timm (timm.list_models() names them)'
            )
        for name in (
            'n_classes',
            'image_size',
            'epochs',
            'batch_size',
            'cosine_epochs',
            'eval_interval',
        ):
            if getattr(self, name) < 1:
                raise UserError(f'{name}: {getattr(self, name)} must be 1 or more')
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
    grader: str = 'network'
    features: str = 'lite1'
    features_arch: str = ''
    probe: str = 'logistic'
    labels: str = 'majority'
    initial_weights: str = ''
    seeds: tuple = (0, 1, 2)
    validation_fraction: float = 0.1
    save_path: str = 'runs/classification'

    def __post_init__(self) -> None:
        for name, choices in (('grader', GRADERS), ('labels', LABELS), ('probe', KINDS)):
            if getattr(self, name) not in choices:
                raise UserError(f'{name}: {getattr(self, name)!r} is none of {", ".join(choices)}')
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f'validation_fraction: {self.validation_fraction} must lie between 0 and 1'
            )

    def to_dict(self) -> dict[str, Any]:
        """A flat dict, as in the YAML file."""
        flat = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'settings'
        }
        flat.update(dataclasses.asdict(self.settings))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}


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
    values.update({k: v for k, v in overrides.items() if v is not None})
    defaults = Config(settings=Settings()).to_dict()
    for name, value in values.items():
        if name not in defaults:
            near = difflib.get_close_matches(str(name), defaults, n=1)
            hint = f'; did you mean {near[0]}?' if near else ''
            raise UserError(f'{path}: unknown entry {name}{hint}')
        values[name] = _typed(path, name, value, defaults[name])
    grader_names = {f.name for f in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in values.items() if k in grader_names})
    return Config(settings=settings, **{k: v for k, v in values.items() if k not in grader_names})


def _typed(path: str | Path, name: str, value: object, default: object) -> Any:
    """`value` in the type of the entry's default; UserError when it does not fit."""
    if name in ('mean', 'std', 'seeds'):
        if value is None and name != 'seeds':
            return None
        number = int if name == 'seeds' else float
        if isinstance(value, (list, tuple)) and (name == 'seeds' and value or len(value) == 3):
            try:
                return tuple(number(v) for v in value)
            except (TypeError, ValueError):
                pass
        wanted = 'a list of whole numbers' if name == 'seeds' else 'a list of three numbers'
        raise UserError(f'{path}: {name} must be {wanted}, not {value!r}')
    kind = type(default)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a word
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f'{path}: {name} must be of type {kind.__name__}, not {value!r}')
    return value
