"""What shapes a release."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from anonymization.grouping import METHODS, POLICIES, SURPLUS
from anonymization.optimize import PRECISIONS, OptimizeConfig
from utils.errors import UserError

# Where a flag of scripts/k-SALSA.py has another name than its setting: run records and messages
# speak in flags.
_FLAGS = {
    'k': 'same_k',
    'n_iters': 'n_iters_per_batch',
    'batch_size': 'test_batch_size',
    'n_steps': 'num_steps',
    'n_crop': 'num_crop',
}
# Value of --strata -> attribute of a table.
STRATA = {
    'eye': 'eyes',
    'label': 'labels',
    'referable': 'referable',
    'visit': 'visits',
    'split': 'splits',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shapes a release; paper settings are the defaults.

    k: fewest distinct patients in a group. strata: names of table columns ('eyes', 'labels',
    'referable', 'visits', 'splits') that groups never cross. grade_penalty: how much grades count
    in the grouping beside the latents, in parts of the latents' total variance. start_noise: how
    far from the mean of its members a group starts, by secret noise, in standard deviations of the
    generator's latents; start_key: file of its key (anonymization.starts), None draws one.
    reduce_dim: group on that many principal components. mirror_left: left eyes are mirrored, so
    that optic discs align. n_iters: refinements of the inversion. batch_size: photographs per unit
    of work. group_batch: most groups optimised at a time, None takes what memory allows.
    deterministic: the same bytes again on a GPU, too, more slowly. data: a name for the run record.
    """

    k: int = 5
    clustering: str = 'default'
    policy: str = 'distinct'
    surplus: str = 'error'
    strata: tuple[str, ...] = ()
    grade_penalty: float = 0.0
    start_noise: float = 0.0
    start_key: str | None = None
    reduce_dim: int | None = None
    mirror_left: bool = False
    n_iters: int = 5
    batch_size: int = 8
    group_batch: int | None = None
    precision: str = 'fp32'
    deterministic: bool = False
    optimize: OptimizeConfig = OptimizeConfig()
    resize_outputs: bool = False
    soft_labels: bool = False
    centroids: bool = False
    save_reconstructions: bool = False
    data: str = ''
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """All settings by flag, as JSON holds them."""
        flat = dataclasses.asdict(self)
        flat |= flat.pop('optimize')
        back = {column: value for value, column in STRATA.items()}
        flat['strata'] = [back.get(s, s) for s in self.strata]
        flat['style_strides'] = list(self.optimize.style_strides)
        return {_FLAGS.get(name, name): value for name, value in flat.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> 'Settings':
        """The settings that flags give; other entries of `options` are passed over."""

        def of(kind: type, *but: str) -> dict[str, Any]:
            names = [f.name for f in dataclasses.fields(kind) if f.name not in but]
            return {n: options[_FLAGS.get(n, n)] for n in names if _FLAGS.get(n, n) in options}

        optimize = of(OptimizeConfig)
        if 'style_strides' in optimize:
            optimize['style_strides'] = tuple(optimize['style_strides'])
        own = of(cls, 'optimize', 'strata')
        strata = tuple(STRATA[s] for s in options.get('strata', ()))
        return cls(**own, strata=strata, optimize=OptimizeConfig(**optimize))

    def check(self) -> None:
        """UserError for what is no setting, before anything is read."""
        if not isinstance(self.k, int) or self.k < 2:
            raise UserError(
                f"--same_k {self.k}: a group of one is the patient's own picture; use 2 or more"
            )
        chosen = {
            'clustering': (self.clustering, tuple(METHODS)),
            'policy': (self.policy, POLICIES),
            'surplus': (self.surplus, SURPLUS),
            'precision': (self.precision, PRECISIONS),
        }
        for name, (value, known) in chosen.items():
            if value not in known:
                raise UserError(f'--{name} {value}: choose from {", ".join(known)}')
        for name in ('grade_penalty', 'start_noise'):
            if not 0 <= getattr(self, name) < float('inf'):
                raise UserError(f'--{name} {getattr(self, name)}: want a number, 0 or more')
        if unknown := [s for s in self.strata if s not in STRATA.values()]:
            raise UserError(f'--strata {unknown[0]}: choose from {", ".join(STRATA.values())}')
