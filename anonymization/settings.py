"""What shapes a release."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from anonymization.calibrated import NoiseConfig
from anonymization.grouping import DEALT, METHODS, POLICIES, SURPLUS
from anonymization.optimize import PRECISIONS, OptimizeConfig
from anonymization.photographs import SIDES
from utils import options
from utils.errors import UserError
from utils.kinds import (
    boolean,
    choice,
    list_of,
    named,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    text,
)
from utils.options import option

_STRIDES, _MOST_STEPS = (2, 4, 8, 16, 32), 100_000
# Value of --strata -> attribute of a table.
STRATA = {
    'eye': 'eyes',
    'label': 'labels',
    'referable': 'referable',
    'visit': 'visits',
    'split': 'splits',
}
_GROUPS, _HOW, _OUTPUT, _MACHINE = 'groups', 'optimisation', 'output', 'machine'


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shapes a release; paper settings are the defaults.

    k: fewest distinct patients in a group. strata: names of table columns ('eyes', 'labels',
    'referable', 'visits', 'splits') that groups never cross. grade_penalty: how much grades count
    in the grouping beside the latents, in parts of the latents' total variance. start_noise: how
    far from the mean of its members a group starts, by secret noise, in standard deviations of the
    generator's latents; start_key: file of the key of secret noise (anonymization.starts), None
    draws one. noise: what differential privacy asks for.
    reduce_dim: group on that many principal components. sides: 'mirror' (left eyes
    are mirrored before anything else, so that optic discs align), 'apart' (groups never cross
    sides), 'mixed' (published). n_iters: refinements of the inversion. batch_size: photographs per
    unit of work. group_batch: most groups optimised at a time, None takes what memory allows.
    deterministic: the same bytes again on a GPU, too, more slowly. data: a name for the run record.
    """

    k: int = option(
        5,
        positive_int,
        'fewest distinct patients in a group',
        group=_GROUPS,
        metavar='K',
        flag='same_k',
    )
    clustering: str = option(
        'default',
        choice(*METHODS),
        "how groups are found; published: the paper's greedy; random: dealt out within strata, "
        'without a look at the photographs',
        group=_GROUPS,
    )
    policy: str = option(
        'distinct',
        choice(*POLICIES),
        "distinct: no patient twice in a group; together: all of a patient's images in one group",
        group=_GROUPS,
    )
    surplus: str = option(
        'error',
        choice(*SURPLUS),
        'a patient with more images than there are groups: stop, or leave out the images that '
        'fit nowhere',
        group=_GROUPS,
    )
    strata: tuple[str, ...] = option(
        (),
        list_of(named(STRATA), f'different names of {", ".join(STRATA.values())}'),
        'columns that groups never cross; referable: grades 0 and 1 against 2 to 4',
        group=_GROUPS,
    )
    grade_penalty: float = option(
        0.0,
        nonnegative_float,
        'how much unlike grades count against a group, in parts of the variance of the latents '
        '(0: not at all)',
        group=_GROUPS,
        metavar='SHARE',
    )
    reduce_dim: int | None = option(
        None,
        positive_int,
        'group on the first D principal components (default: as needed)',
        group=_GROUPS,
        metavar='D',
    )
    sides: str = option(
        'mirror',
        choice(*SIDES),
        'mirror: left eyes are mirrored first, so that optic discs align; which eyes those are '
        'says the eye column, else the picture; apart: groups never cross sides; mixed: as they '
        'come (published)',
        group=_GROUPS,
    )
    start_noise: float = option(
        0.0,
        nonnegative_float,
        "secret noise on every group's start, in standard deviations of the generator's latents, "
        'so that nobody can repeat the run',
        group=_HOW,
        metavar='SD',
    )
    start_key: str | None = option(
        None,
        text,
        'key of secret noise, that of `epsilon` too, such as private/start.key of another run '
        '(default: a new one)',
        group=_HOW,
        metavar='FILE',
        free=True,
    )
    optimize: OptimizeConfig = OptimizeConfig()
    noise: NoiseConfig = NoiseConfig()
    n_iters: int = option(
        5,
        positive_int,
        'refinements of the inversion',
        group=_HOW,
        metavar='N',
        flag='n_iters_per_batch',
    )
    resize_outputs: bool = option(
        False,
        boolean,
        "write pictures at the encoder's size instead of the generator's",
        group=_OUTPUT,
    )
    soft_labels: bool = option(
        False,
        boolean,
        'labels.csv and metadata.csv also give the share of each grade',
        group=_OUTPUT,
    )
    centroids: bool = option(
        False,
        boolean,
        'also write the plain latent-mean pictures to private/centroids/',
        group=_OUTPUT,
    )
    save_reconstructions: bool = option(
        False,
        boolean,
        'also write every inverted photograph to private/reconstructions/',
        group=_OUTPUT,
    )
    data: str = option(
        '',
        text,
        'name of the data set, kept in private/options.json',
        group=_OUTPUT,
        metavar='NAME',
        free=True,
    )
    batch_size: int = option(
        8,
        positive_int,
        'photographs per unit of work, on a GPU inverted together (not tied to k)',
        group=_MACHINE,
        metavar='N',
        flag='test_batch_size',
        free=True,
    )
    group_batch: int | None = option(
        None,
        positive_int,
        'groups optimised at a time (default: on a CPU one per core, on a GPU what memory allows)',
        group=_MACHINE,
        metavar='N',
        free=True,
    )
    precision: str = option(
        'fp32', choice(*PRECISIONS), 'arithmetic of the optimisation', group=_MACHINE
    )
    deterministic: bool = option(
        False,
        boolean,
        'the same bytes again on a GPU too: deterministic operations, every photograph and group '
        'alone; slower. On a CPU it is always so',
        group=_MACHINE,
    )
    seed: int = option(0, nonnegative_int, 'random seed', group=_MACHINE, metavar='INT')

    def options(self) -> dict[str, Any]:
        """All settings as runs are recorded, by published flag."""
        return options.entries(self, recorded=True)

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> 'Settings':
        """The settings that flags or a record give; other entries are passed over."""
        return options.build(cls, given)

    def check(self) -> None:
        """UserError for what is no setting, before anything is read."""
        options.check(self)
        options.check(self.optimize)
        options.check(self.noise)
        self.noise.check(self.optimize, self.start_noise)
        if self.k < 2:
            raise UserError(
                f"`k` {self.k}: a group of one is the patient's own picture; use 2 or more"
            )
        strides, steps = self.optimize.style_strides, self.optimize.n_steps
        if len(set(strides)) < len(strides) or not set(strides) <= set(_STRIDES):
            raise UserError(
                f'`style_strides` {list(strides)}: want different ones of '
                f'{", ".join(map(str, _STRIDES))}'
            )
        if steps > _MOST_STEPS:
            raise UserError(f'`n_steps` {steps}: at most {_MOST_STEPS}')
        if self.seed >= 2**63:
            raise UserError(f'`seed` {self.seed}: want less than 2^63')
        if self.clustering == DEALT and self.grade_penalty:
            raise UserError(
                '`grade_penalty` has no effect on `clustering` random, which looks at nothing but '
                '`strata`; leave it out, or use `strata` label'
            )

    @property
    def secret(self) -> bool:
        """Whether a key decides what groups start from."""
        return bool(self.start_noise) or self.noise.epsilon is not None
