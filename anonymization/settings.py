"""What shapes a release."""

import dataclasses

from anonymization.optimize import OptimizeConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shapes a release; paper settings are the defaults.

    strata: names of table columns ('eyes', 'labels') that groups never cross. group_batch: most
    groups optimised at a time, None takes what memory allows. reduce_dim: group on that many
    principal components. mirror_left: left eyes are mirrored, so that optic discs align.
    deterministic: the same bytes again on a GPU, too, more slowly.
    """

    k: int = 5
    clustering: str = 'default'
    policy: str = 'distinct'
    surplus: str = 'error'
    strata: tuple = ()
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
    seed: int = 0
