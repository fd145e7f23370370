"""Fine texture: how much power a set of pictures has at which spatial frequencies.

Pictures are uint8 [n, 3, S, S].
"""

import numpy as np
import torch
from jaxtyping import Float64, Num, UInt8
from torch import Tensor

from evaluation.bootstrap import ratio_of_means

HIGH = 0.4  # of the Nyquist frequency: where fine vessels and small lesions begin
_LUMA = (0.299, 0.587, 0.114)
_GREEN = (0.0, 1.0, 0.0)  # where vessels and lesions have their contrast
_BATCH = 256


def _power(
    pictures: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'], colours: tuple[float, ...]
) -> Float64[Tensor, 'n S S']:
    """Power spectra, float64 [n, S, S], of a weighted sum of the channels.

    A Hann window keeps the frame's edges out of the spectrum.
    """
    size = pictures.shape[-1]
    window = torch.hann_window(size, periodic=False, dtype=torch.float64)
    weights = torch.tensor(colours, dtype=torch.float64).view(1, 3, 1, 1)
    values = (torch.as_tensor(pictures).double() / 255 * weights).sum(1)
    values = (values - values.mean((1, 2), keepdim=True)) * (window[:, None] * window)
    return torch.fft.fft2(values).abs().square()


def _radius(size: int) -> Num[Tensor, '{size} {size}']:
    """Distance of every frequency from 0, [S, S], in whole cycles per side."""
    frequency = torch.fft.fftfreq(size, dtype=torch.float64) * size
    return (frequency[:, None] ** 2 + frequency**2).sqrt()


def radial_spectrum(
    pictures: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
) -> Float64[np.ndarray, ' r']:
    """Mean power of the luminance at 0, 1, 2 ... whole cycles per side, float64 [S // 2]."""
    size = pictures.shape[-1]
    radius = _radius(size).round().long().flatten()
    power = torch.zeros(size, size, dtype=torch.float64)
    for start in range(0, len(pictures), _BATCH):
        power += _power(pictures[start : start + _BATCH], _LUMA).sum(0)
    total = torch.zeros(int(radius.max()) + 1, dtype=torch.float64)
    count = total.clone()
    total.index_add_(0, radius, power.flatten() / len(pictures))
    count.index_add_(0, radius, torch.ones_like(power).flatten())
    return (total / count)[: size // 2].numpy()


def sharpness(
    real_pictures: UInt8[np.ndarray, 'n 3 S S'], fake_pictures: UInt8[np.ndarray, 'm 3 S S']
) -> dict:
    """Compares radial power spectra of pictures of one size.

    high_frequency_ratio: power of the synthetic over that of the real pictures in the upper half
    of the frequencies (below 1: blurrier than real). log_spectrum_rmse: root mean square
    difference of log10 power over all frequencies. Also both spectra.
    """
    if real_pictures.shape[-2:] != fake_pictures.shape[-2:]:
        raise ValueError(
            f'pictures of {tuple(real_pictures.shape[-2:])} and '
            f'{tuple(fake_pictures.shape[-2:])} px cannot be compared'
        )
    real, fake = radial_spectrum(real_pictures), radial_spectrum(fake_pictures)
    upper = slice(len(real) // 2, None)
    floor = 1e-12
    gap = np.log10(fake[1:] + floor) - np.log10(real[1:] + floor)
    return {
        'high_frequency_ratio': float(fake[upper].sum() / max(real[upper].sum(), floor)),
        'log_spectrum_rmse': float(np.sqrt(np.mean(gap**2))),
        'real_spectrum': real.tolist(),
        'fake_spectrum': fake.tolist(),
    }


def high_frequency_power(
    pictures: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
) -> Float64[np.ndarray, ' n']:
    """Power of the green channel above 0.4 of the Nyquist frequency, float64 [n].

    Of the central half (side S // 2), which shows retina and neither rim nor corners.
    """
    size = pictures.shape[-1] // 2
    start = (pictures.shape[-1] - size) // 2
    middle = pictures[..., start : start + size, start : start + size]
    high = _radius(size) > HIGH * size / 2
    return np.concatenate(
        [
            _power(middle[i : i + _BATCH], _GREEN)[:, high].mean(1).numpy()
            for i in range(0, len(middle), _BATCH)
        ]
    )


def high_frequency_ratio(
    photographs: UInt8[np.ndarray, 'n 3 S S'],
    release: UInt8[np.ndarray, 'm 3 S S'],
    *,
    people: list[str] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """`high_frequency_power` of a release over that of photographs: {value, low, high}.

    Both of one size S. people: whom each photograph shows, the unit of the interval.
    """
    if photographs.shape[-1] != release.shape[-1]:
        raise ValueError(
            f'pictures of {photographs.shape[-1]} and {release.shape[-1]} px cannot be compared'
        )
    return ratio_of_means(
        high_frequency_power(release), high_frequency_power(photographs), people=people, seed=seed
    )
