"""Configurations of the generator training, resolved from presets and the user's choices.

Source of the published presets: Karras et al. 2020 (ADA), appendix C, and the options of the
authors' training tool.
"""

import dataclasses
from typing import Any

from models.stylegan2 import channel_table

# size -> channels of nets a two-core machine trains in an hour or two
_SMALL_CHANNELS = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 32, 256: 16, 512: 16, 1024: 16}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes the networks and the optimisation; sizes in images and kimg."""

    size: int
    channels: dict[int, int]
    n_mlp: int
    kimg: float
    batch: int  # images per step, all processes together
    batch_gpu: int  # images per forward pass
    mbstd_group: int
    lr: float
    gamma: float  # R1 weight
    ema_kimg: float  # half-life of the weight average
    ema_rampup: float | None
    style_dim: int = 512
    style_mixing: float = 0.9
    pl_weight: float = 2.0
    pl_decay: float = 0.01
    pl_batch_shrink: int = 2
    d_reg_interval: int = 16
    g_reg_interval: int = 4
    use_noise: bool = True  # noise injection in the generator's layers
    freezed: int = 0  # discriminator layers kept frozen, from the image side
    discriminator: str = 'stylegan2'  # or 'projected'
    d_lr: float | None = None  # rate of the discriminator, where another than lr

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRESETS = ('auto', 'stylegan2', 'paper256', 'paper512', 'paper1024', 'small')


# kimg, batch, mbstd_group, channel multiplier, lr, gamma, ema_kimg
_PUBLISHED = {
    'stylegan2': (25_000, 32, 4, 2, 0.002, 10.0, 10),
    'paper256': (25_000, 64, 8, 1, 0.0025, 1.0, 20),
    'paper512': (25_000, 64, 8, 2, 0.0025, 0.5, 20),
    'paper1024': (25_000, 32, 4, 2, 0.002, 2.0, 10),
}


def make_config(
    preset: str,
    size: int,
    n_gpus: int,
    *,
    cbase: int | None = None,
    cmax: int | None = None,
    **overrides: Any,
) -> TrainConfig:
    """Resolves a preset for images of `size` px and `n_gpus` processes.

    cbase, cmax: channels are cbase / resolution, at most cmax; what is None is the preset's.
    overrides: fields of TrainConfig; None keeps the preset's value. Raises ValueError when the
    batch cannot be divided among the processes, or cbase leaves a resolution without channels.
    """
    if preset not in PRESETS:
        raise ValueError(f'unknown configuration {preset!r}, want one of {", ".join(PRESETS)}')
    given = {k: v for k, v in overrides.items() if v is not None}
    if given.get('batch', n_gpus) < n_gpus:
        raise ValueError(
            f'`batch` {given["batch"]} is smaller than the number of processes '
            f'({n_gpus}); raise `batch` or lower `gpus`'
        )
    resolve = _published if preset in _PUBLISHED else _automatic
    values = resolve(preset, size, n_gpus, given.get('batch'))
    values['channels'] = widths(values['channels'], size, cbase, cmax)
    if given.get('discriminator') == 'projected':
        # The published rate, and no penalties: spectral norms hold the heads.
        values.update(lr=0.002, gamma=0.0, pl_weight=0.0)
    values.update(given)
    config = TrainConfig(size=size, **values)
    check_division(config, n_gpus)
    return config


def _automatic(preset: str, size: int, n_gpus: int, batch: int | None) -> dict[str, Any]:
    """The values of 'auto' and 'small', which follow from size and number of processes."""
    most = 16 if preset == 'small' else 32
    usual = max(min(n_gpus * min(4096 // size, most), 64), n_gpus)
    batch = batch or usual
    # As published, a batch leaves the other values of 'auto' as they are.
    basis = batch if preset == 'small' else usual
    values: dict[str, Any] = dict(
        kimg=25_000,
        batch=batch,
        batch_gpu=batch // n_gpus,
        mbstd_group=min(max(basis // n_gpus, 1), 4),
        lr=0.002 if size >= 1024 else 0.0025,
        gamma=0.0002 * size**2 / basis,
        ema_kimg=basis * 10 / 32,
        ema_rampup=0.05,
        n_mlp=2,
        channels=channel_table(size, 2 if size >= 512 else 1),
    )
    if preset == 'small':
        values['channels'] = {r: c for r, c in _SMALL_CHANNELS.items() if r <= size}
        values['kimg'] = 200
        values['pl_weight'] = 0.0  # a tenth of the time, for a smoothness small nets have
        # Small nets draw vessels as a texture of the noise and never learn their course.
        values['use_noise'] = False
    return values


def _published(preset: str, size: int, n_gpus: int, batch: int | None) -> dict[str, Any]:
    """The values of the presets of the paper, made for 8 GPUs."""
    kimg, usual, mbstd, multiplier, lr, gamma, ema = _PUBLISHED[preset]
    batch = batch or usual
    return dict(
        kimg=kimg,
        batch=batch,
        # Fewer GPUs than 8 accumulate gradients over rounds.
        batch_gpu=max(batch // max(n_gpus, 8), 1) if batch >= n_gpus else 1,
        mbstd_group=mbstd,
        lr=lr,
        gamma=gamma,
        ema_kimg=ema,
        ema_rampup=None,
        n_mlp=8,
        channels=channel_table(size, multiplier),
    )


def widths(
    channels: dict[int, int], size: int, cbase: int | None, cmax: int | None
) -> dict[int, int]:
    """The table `channels`, or that of cbase and cmax (where None, as wide as the table).

    ValueError when it leaves a resolution without channels.
    """
    if cbase is None and cmax is None:
        return channels
    cbase = cbase or channels[size] * size
    cmax = cmax or max(channels.values())
    if cbase < size:
        raise ValueError(f'`cbase` {cbase} leaves no channel at {size} px')
    return {r: min(cbase // r, cmax) for r in channels}


def check_division(config: TrainConfig, n_gpus: int) -> None:
    """ValueError when processes and passes do not divide the batch."""
    if config.batch % (config.batch_gpu * n_gpus):
        raise ValueError(
            f'`batch` {config.batch} is not a multiple of {n_gpus} process(es) x '
            f'{config.batch_gpu} images per pass; choose `batch`, `gpus` or '
            '`batch_gpu` so that it is'
        )
