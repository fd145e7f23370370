"""Adaptive discriminator augmentation: the 16 transformations and the strength heuristic.

Source: Karras et al. 2020, 'Training Generative Adversarial Networks with Limited Data',
section 2 (adaptive strength) and appendix B (transformations and their order).
Shapes: N images, [N, 3, H, W], values nominally in [-1, 1].
What is decided per image (gates, matrices, filters) is computed on the CPU, from a generator of
the CPU, and sent to the images' device in one copy: a GPU would need hundreds of small operations
for it, and the host would have to wait for the sizes that follow from it.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from training.resampling import (
    GridSample,
    Margins,
    double_by_filters,
    double_by_matrices,
    halve_by_filters,
    halve_by_matrices,
)
from utils.transfer import send_together

BLIT = ('xflip', 'rotate90', 'xint')
GEOM = ('scale', 'rotate', 'aniso', 'xfrac')
COLOR = ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation')
PIPES = {
    'blit': BLIT,
    'geom': GEOM,
    'color': COLOR,
    'filter': ('imgfilter',),
    'noise': ('noise',),
    'cutout': ('cutout',),
    'bg': BLIT + GEOM,
    'bgc': BLIT + GEOM + COLOR,
    'bgcf': BLIT + GEOM + COLOR + ('imgfilter',),
    'bgcfn': BLIT + GEOM + COLOR + ('imgfilter', 'noise'),
    'bgcfnc': BLIT + GEOM + COLOR + ('imgfilter', 'noise', 'cutout'),
    # Those of DiffAugment (Zhao et al. 2020), for the projected discriminator.
    'diff': ('xint', 'brightness', 'contrast', 'saturation', 'cutout'),
}
MAX_STRENGTH = 0.8  # beyond it the transformations leak into the generator (ADA, section 2.2)

_XINT_MAX, _XFRAC_STD, _SCALE_STD, _ANISO_STD = 0.125, 0.125, 0.2, 0.2
_BRIGHTNESS_STD, _CONTRAST_STD, _SATURATION_STD = 0.2, 0.5, 1.0
_FILTER_STD, _NOISE_STD, _CUTOUT_SIZE = 1.0, 0.1, 0.5
_BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected spectrum of photographs, 1/f


class RandomDraws:
    """Per-sample random numbers on the CPU; `gate` decides whether a sample is hit.

    device: of the pixels' noise, which `pixel_generator` draws there; None: `generator`, which is
    one of the CPU.
    """

    def __init__(
        self,
        n: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        pixel_generator: torch.Generator | None = None,
    ) -> None:
        self.n, self.device, self.generator = n, device, generator
        self.pixel_generator = generator if pixel_generator is None else pixel_generator

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.n, *shape, generator=self.generator)

    def gate(self, probability: float) -> Tensor:
        return self.uniform() < probability

    def pixel_noise(self, images: Tensor) -> Tensor:
        return torch.randn(images.shape, device=self.device, generator=self.pixel_generator)


class PercentileDraws(RandomDraws):
    """Every draw replaced by its percentile, every transformation applied: for checking.

    The normal percentile is erfinv(2q - 1), without the factor sqrt(2), as in the reference.
    """

    def __init__(self, n: int, device: torch.device | str, percentile: float) -> None:
        super().__init__(n, device)
        self.percentile = percentile

    def uniform(self, *shape: int) -> Tensor:
        return torch.full((self.n, *shape), self.percentile)

    def normal(self, *shape: int) -> Tensor:
        return torch.erfinv(self.uniform(*shape) * 2 - 1)

    def gate(self, probability: float) -> Tensor:
        return torch.ones(self.n, dtype=torch.bool)


class AugmentPipe:
    """Applies a chosen set of transformations, each with probability p per image.

    names: entries of PIPES' tuples, e.g. PIPES['bgc']. Differentiable twice with respect to
    the images, as R1 needs.
    """

    def __init__(self, names: Iterable[str], device: torch.device | str) -> None:
        self.names = frozenset(names)
        unknown = self.names - set(PIPES['bgcfnc'])
        if unknown:
            raise ValueError(f'unknown augmentations {sorted(unknown)}')
        low = torch.tensor(pywt.Wavelet('sym6').dec_lo, dtype=torch.float32)
        self._geom_taps = low / low.sum()
        self._device_taps = self._geom_taps.to(device)
        self._bands = torch.tensor(_filter_bank(), dtype=torch.float32)

    def __call__(
        self,
        images: Tensor,
        p: float,
        *,
        generator: torch.Generator | None = None,
        pixel_generator: torch.Generator | None = None,
        draws: RandomDraws | None = None,
    ) -> Tensor:
        """images [N, 3, H, W] -> the same shape; p: strength in [0, 1].

        generator: of the CPU. pixel_generator: of the images' device, needed for 'noise' there;
        None on a CPU.
        """
        if draws is None:
            if p <= 0:
                return images
            draws = RandomDraws(images.shape[0], images.device, generator, pixel_generator)
        plan: dict[str, Tensor] = {}
        margins = None
        inverse = self._geometry(draws, p, *images.shape[2:])
        if inverse is not None and self.names & {*BLIT, *GEOM} == {'xint'}:
            images = _shift(images, inverse)
        elif inverse is not None:
            plan['where'], margins = self._aim(inverse, *images.shape[2:])
        color = self._color(draws, p)
        if color is not None:
            plan |= {'color': color[:, :3, :3], 'shift': color[:, :3, 3, None, None]}
        if 'imgfilter' in self.names:
            plan['taps'] = self._filter_taps(draws, p).repeat_interleave(images.shape[1], 0)
        if 'noise' in self.names:
            sigma = draws.normal().abs() * _NOISE_STD * draws.gate(p)
            plan['sigma'], noise = sigma[:, None, None, None], draws.pixel_noise(images)
        if 'cutout' in self.names:
            plan |= _cutout(draws, p, *images.shape[2:])
        plan = send_together(plan, images.device)
        if margins is not None:
            images = self._warp(images, plan['where'], margins)
        if color is not None:
            images = torch.einsum('nij,njhw->nihw', plan['color'], images) + plan['shift']
        if 'imgfilter' in self.names:
            images = _filter(images, plan['taps'])
        if 'noise' in self.names:
            images = images + noise * plan['sigma']
        if 'cutout' in self.names:
            images = images * (1 - plan['hidden_rows'] * plan['hidden_columns'])
        return images

    def _geometry(self, draws: RandomDraws, p: float, height: int, width: int) -> Tensor | None:
        """[N, 3, 3] maps of output to input pixel positions (origin in the centre), or None."""
        if not self.names & {*BLIT, *GEOM}:
            return None
        inverse = torch.eye(3).expand(draws.n, 3, 3)

        def keep(gate: Tensor, value: Tensor, neutral: float) -> Tensor:
            return torch.where(gate, value, torch.full_like(value, neutral))

        if 'xflip' in self.names:
            mirrored = keep(draws.gate(p), (draws.uniform() * 2).floor(), 0)
            inverse = inverse @ _scale(1 - 2 * mirrored, torch.ones_like(mirrored))
        if 'rotate90' in self.names:
            turns = keep(draws.gate(p), (draws.uniform() * 4).floor(), 0)
            inverse = inverse @ _rotate(turns * math.pi / 2)
        if 'xint' in self.names:
            gate, shift = draws.gate(p), (draws.uniform(2) * 2 - 1) * _XINT_MAX
            shift = keep(gate[:, None], shift, 0)
            inverse = inverse @ _translate(
                -(shift[:, 0] * width).round(), -(shift[:, 1] * height).round()
            )
        if 'scale' in self.names:
            factor = keep(draws.gate(p), torch.exp2(draws.normal() * _SCALE_STD), 1)
            inverse = inverse @ _scale(1 / factor, 1 / factor)
        # Two rotations around the anisotropic scaling, so that together they hit with p.
        p_rotate = 1 - math.sqrt(1 - min(max(p, 0.0), 1.0))
        if 'rotate' in self.names:
            angle = keep(draws.gate(p_rotate), (draws.uniform() * 2 - 1) * math.pi, 0)
            inverse = inverse @ _rotate(angle)
        if 'aniso' in self.names:
            factor = keep(draws.gate(p), torch.exp2(draws.normal() * _ANISO_STD), 1)
            inverse = inverse @ _scale(1 / factor, factor)
        if 'rotate' in self.names and not isinstance(draws, PercentileDraws):
            angle = keep(draws.gate(p_rotate), (draws.uniform() * 2 - 1) * math.pi, 0)
            inverse = inverse @ _rotate(angle)
        if 'xfrac' in self.names:
            gate, shift = draws.gate(p), draws.normal(2) * _XFRAC_STD
            shift = keep(gate[:, None], shift, 0)
            inverse = inverse @ _translate(-shift[:, 0] * width, -shift[:, 1] * height)
        return inverse

    def _aim(self, inverse: Tensor, height: int, width: int) -> tuple[Tensor, Margins]:
        """What _warp needs: positions as [N, 2, 3] maps for F.affine_grid, and margins."""
        reach = self._geom_taps.numel() // 4
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) * half
        seen = corners @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]  # [N, 4, 2]
        # How far the batch looks beyond the picture, and the filter beyond that.
        before = (-seen - half).amax((0, 1)) + 2 * reach
        after = (seen - half).amax((0, 1)) + 2 * reach
        left, top, right, bottom = (
            int(v) for v in torch.cat([before, after]).clamp(min=0).ceil().tolist()
        )
        margins = Margins(
            min(left, width - 1),
            min(right, width - 1),
            min(top, height - 1),
            min(bottom, height - 1),
        )
        left, right, top, bottom = margins
        inverse = _fixed(_translate, (left - right) / 2, (top - bottom) / 2) @ inverse
        # Pixel centres of the doubled picture lie half a pixel off those of the original.
        inverse = _fixed(_scale, 2.0, 2.0) @ inverse @ _fixed(_scale, 0.5, 0.5)
        inverse = _fixed(_translate, -0.5, -0.5) @ inverse @ _fixed(_translate, 0.5, 0.5)
        seen_h, seen_w = 2 * (height + top + bottom), 2 * (width + left + right)
        out_h, out_w = self._doubled(height), self._doubled(width)
        theta = (
            _fixed(_scale, 2 / seen_w, 2 / seen_h) @ inverse @ _fixed(_scale, out_w / 2, out_h / 2)
        )
        return theta[:, :2], margins

    def _doubled(self, n: int) -> int:
        """Samples along an axis of n pixels, at twice the density and with a margin."""
        return (n + self._geom_taps.numel() // 4 * 2) * 2

    def _warp(self, images: Tensor, where: Tensor, margins: Margins) -> Tensor:
        """Resamples `images` at the positions `where` of _aim, antialiased at twice the size."""
        n, channels, height, width = images.shape
        double, halve = (
            (double_by_filters, halve_by_filters)
            if images.is_cuda
            else (double_by_matrices, halve_by_matrices)
        )
        taps = self._device_taps
        images = double(images, taps, margins)
        positions = F.affine_grid(
            where, [n, channels, self._doubled(height), self._doubled(width)], align_corners=False
        )
        return halve(GridSample.apply(images, positions), taps)

    def _color(self, draws: RandomDraws, p: float) -> Tensor | None:
        """[N, 4, 4] affine maps of RGB, or None."""
        if not self.names & set(COLOR):
            return None
        eye = torch.eye(4)
        matrix = eye.expand(draws.n, 4, 4)
        luma = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
        along = torch.outer(luma, luma)

        def gated(value: Tensor, neutral: float) -> Tensor:
            return torch.where(draws.gate(p), value, torch.full_like(value, neutral))

        if 'brightness' in self.names:
            shift = gated(draws.normal() * _BRIGHTNESS_STD, 0)
            moved = eye.repeat(draws.n, 1, 1)
            moved[:, :3, 3] = shift[:, None]
            matrix = moved @ matrix
        if 'contrast' in self.names:
            factor = gated(torch.exp2(draws.normal() * _CONTRAST_STD), 1)
            diagonal = torch.cat(
                [factor[:, None].expand(-1, 3), torch.ones_like(factor[:, None])], 1
            )
            matrix = torch.diag_embed(diagonal) @ matrix
        if 'lumaflip' in self.names:
            flip = gated((draws.uniform() * 2).floor(), 0)[:, None, None]
            matrix = (eye - 2 * along * flip) @ matrix
        if 'hue' in self.names:
            angle = gated((draws.uniform() * 2 - 1) * math.pi, 0)
            matrix = _rotate_about(luma[:3], angle) @ matrix
        if 'saturation' in self.names:
            factor = gated(torch.exp2(draws.normal() * _SATURATION_STD), 1)[:, None, None]
            matrix = (along + (eye - along) * factor) @ matrix
        return matrix

    def _filter_taps(self, draws: RandomDraws, p: float) -> Tensor:
        """[N, taps]: filters that scale four frequency bands, keeping the expected power."""
        power, gains = torch.tensor(_BAND_POWER), torch.ones(draws.n, 4)
        for band in range(4):
            gate, value = draws.gate(p), torch.exp2(draws.normal() * _FILTER_STD)
            one = torch.ones(draws.n, 4)
            one[:, band] = torch.where(gate, value, torch.ones_like(value))
            gains = gains * one * (power * one.square()).sum(1, keepdim=True).rsqrt()
        return gains @ self._bands


def _filter(images: Tensor, taps: Tensor) -> Tensor:
    """Each channel of each image filtered along both axes with its row of taps [N*C, taps]."""
    n, channels, height, width = images.shape
    reach = taps.shape[1] // 2
    x = images.reshape(1, n * channels, height, width)
    mode = 'reflect' if reach < min(height, width) else 'replicate'
    x = F.pad(x, (reach,) * 4, mode=mode)
    x = F.conv2d(x, taps[:, None, None, :], groups=n * channels)
    x = F.conv2d(x, taps[:, None, :, None], groups=n * channels)
    return x.reshape(n, channels, height, width)


def _cutout(draws: RandomDraws, p: float, height: int, width: int) -> dict[str, Tensor]:
    """1 for the columns [N, 1, 1, W] and rows [N, 1, H, 1] whose crossing is blacked out."""
    size = draws.gate(p).float()[:, None] * _CUTOUT_SIZE
    centre = draws.uniform(2)
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    columns = (x - centre[:, :1]).abs() < size / 2
    rows = (y - centre[:, 1:]).abs() < size / 2
    return {
        'hidden_columns': columns.float()[:, None, None, :],
        'hidden_rows': rows.float()[:, None, :, None],
    }


def _shift(images: Tensor, inverse: Tensor) -> Tensor:
    """`images` moved by whole pixels, reflected at the edges: what _warp does, without filters."""
    height, width = images.shape[2:]
    most = [int(_XINT_MAX * width + 0.5), int(_XINT_MAX * height + 0.5)]
    padded = F.pad(images, (most[0], most[0], most[1], most[1]), mode='reflect')
    starts = (inverse[:, :2, 2].round().long() + torch.tensor(most)).tolist()
    return torch.stack(
        [picture[:, y : y + height, x : x + width] for picture, (x, y) in zip(padded, starts)]
    )


class AdaptiveStrength:
    """Moves the augmentation strength p so that E[sign(D(real))] stays at `target`.

    adjust_kimg: thousands of images over which p can go from 0 to 1. p stays in
    [0, MAX_STRENGTH]. Source: ADA, section 2.2, equation 1 (r_t).
    """

    def __init__(self, *, target: float = 0.6, adjust_kimg: float = 500, p: float = 0.0) -> None:
        self.target, self.adjust_kimg, self.p = target, adjust_kimg, p
        self.overfitting = 0.0  # r_t of the last update

    def update(self, mean_sign: float, n_images: int) -> float:
        """One adjustment after `n_images` real images with mean sign `mean_sign`; returns p."""
        self.overfitting = float(mean_sign)
        step = n_images / (self.adjust_kimg * 1000)
        self.p += float(np.sign(self.overfitting - self.target)) * step
        self.p = min(max(self.p, 0.0), MAX_STRENGTH)
        return self.p


def _matrices(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    flat = [
        v if isinstance(v, torch.Tensor) else torch.full_like(like, v) for row in rows for v in row
    ]
    return torch.stack(flat, -1).reshape(*like.shape, len(rows), len(rows))


def _translate(x: Tensor, y: Tensor) -> Tensor:
    return _matrices([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], x)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return _matrices([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], x)


def _rotate(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrices([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], angle)


def _fixed(make: Callable, x: float, y: float) -> Tensor:
    """One [3, 3] matrix for the whole batch."""
    return make(torch.tensor(x), torch.tensor(y))


def _rotate_about(axis: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' rotation about a unit axis [3] by angles [N], as [N, 4, 4]."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = torch.eye(4).repeat(angle.shape[0], 1, 1)
    turn[:, :3, :3] = cos * torch.eye(3) + sin * cross + (1 - cos) * torch.outer(axis, axis)
    return turn


def _filter_bank() -> np.ndarray:
    """Four band-pass filters of the sym2 wavelet, [4, taps]; their sum is the identity."""
    low = np.asarray(pywt.Wavelet('sym2').dec_lo)
    high = low * (-1.0) ** np.arange(low.size)
    low2 = np.convolve(low, low[::-1]) / 2
    high2 = np.convolve(high, high[::-1]) / 2
    bank = np.eye(4, 1)
    for i in range(1, 4):
        spread = np.zeros((4, bank.shape[1] * 2 - 1))
        spread[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in spread])
        start = (bank.shape[1] - high2.size) // 2
        bank[i, start : start + high2.size] += high2
    return bank
