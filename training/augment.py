"""Adaptive discriminator augmentation: the 16 transformations and the strength heuristic.

Source: Karras et al. 2020, 'Training Generative Adversarial Networks with Limited Data',
section 2 (adaptive strength) and appendix B (transformations and their order).
Shapes: N images, [N, 3, H, W], values nominally in [-1, 1].
"""
import math

import numpy as np
import pywt
import torch
import torch.nn.functional as F

from models.stylegan2.op import upfirdn2d

BLIT = ('xflip', 'rotate90', 'xint')
GEOM = ('scale', 'rotate', 'aniso', 'xfrac')
COLOR = ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation')
PIPES = {
    'blit': BLIT, 'geom': GEOM, 'color': COLOR, 'filter': ('imgfilter',), 'noise': ('noise',),
    'cutout': ('cutout',), 'bg': BLIT + GEOM, 'bgc': BLIT + GEOM + COLOR,
    'bgcf': BLIT + GEOM + COLOR + ('imgfilter',),
    'bgcfn': BLIT + GEOM + COLOR + ('imgfilter', 'noise'),
    'bgcfnc': BLIT + GEOM + COLOR + ('imgfilter', 'noise', 'cutout'),
    # Those of DiffAugment (Zhao et al. 2020), for the projected discriminator.
    'diff': ('xint', 'brightness', 'contrast', 'saturation', 'cutout'),
}
MAX_STRENGTH = 0.8    # beyond it the transformations leak into the generator (ADA, section 2.2)

_XINT_MAX, _XFRAC_STD, _SCALE_STD, _ANISO_STD = 0.125, 0.125, 0.2, 0.2
_BRIGHTNESS_STD, _CONTRAST_STD, _SATURATION_STD = 0.2, 0.5, 1.0
_FILTER_STD, _NOISE_STD, _CUTOUT_SIZE = 1.0, 0.1, 0.5
_BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)    # expected spectrum of photographs, 1/f


class RandomDraws:
    """Per-sample random numbers from a torch.Generator; `gate` decides whether a sample is hit."""

    def __init__(self, n, device, generator=None):
        self.n, self.device, self.generator = n, device, generator

    def uniform(self, *shape):
        return torch.rand(self.n, *shape, device=self.device, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(self.n, *shape, device=self.device, generator=self.generator)

    def gate(self, probability):
        return self.uniform() < probability

    def pixel_noise(self, images):
        return torch.randn(images.shape, device=self.device, generator=self.generator)


class PercentileDraws(RandomDraws):
    """Every draw replaced by its percentile, every transformation applied: for checking.

    The normal percentile is erfinv(2q - 1), without the factor sqrt(2), as in the reference.
    """

    def __init__(self, n, device, percentile):
        super().__init__(n, device)
        self.percentile = percentile

    def uniform(self, *shape):
        return torch.full((self.n, *shape), self.percentile, device=self.device)

    def normal(self, *shape):
        return torch.erfinv(self.uniform(*shape) * 2 - 1)

    def gate(self, probability):
        return torch.ones(self.n, dtype=torch.bool, device=self.device)


class AugmentPipe:
    """Applies a chosen set of transformations, each with probability p per image.

    names: entries of PIPES' tuples, e.g. PIPES['bgc']. Differentiable twice with respect to
    the images, as R1 needs.
    """

    def __init__(self, names, device):
        unknown = set(names) - set(PIPES['bgcfnc'])
        if unknown:
            raise ValueError(f'unknown augmentations {sorted(unknown)}')
        self.names = frozenset(names)
        low = torch.tensor(pywt.Wavelet('sym6').dec_lo, dtype=torch.float32, device=device)
        self._geom_taps = low / low.sum()
        self._bands = torch.tensor(_filter_bank(), dtype=torch.float32, device=device)

    def __call__(self, images, p, *, generator=None, draws=None):
        """images [N, 3, H, W] -> the same shape; p: strength in [0, 1]."""
        if draws is None:
            if p <= 0:
                return images
            draws = RandomDraws(images.shape[0], images.device, generator)
        inverse = self._geometry(draws, p, *images.shape[2:])
        if self.names & {*BLIT, *GEOM} == {'xint'}:
            images = _shift(images, inverse)
        elif inverse is not None:
            images = self._warp(images, inverse)
        color = self._color(draws, p)
        if color is not None:
            images = torch.einsum('nij,njhw->nihw', color[:, :3, :3], images)
            images = images + color[:, :3, 3, None, None]
        if 'imgfilter' in self.names:
            images = self._filter(images, draws, p)
        if 'noise' in self.names:
            sigma = draws.normal().abs() * _NOISE_STD * draws.gate(p)
            images = images + draws.pixel_noise(images) * sigma[:, None, None, None]
        if 'cutout' in self.names:
            images = self._cutout(images, draws, p)
        return images

    def _geometry(self, draws, p, height, width):
        """[N, 3, 3] maps of output to input pixel positions (origin in the centre), or None."""
        if not self.names & {*BLIT, *GEOM}:
            return None
        inverse = torch.eye(3, device=draws.device).expand(draws.n, 3, 3)

        def keep(gate, value, neutral):
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
            inverse = inverse @ _translate(-(shift[:, 0] * width).round(),
                                           -(shift[:, 1] * height).round())
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

    def _warp(self, images, inverse):
        """Resamples `images` at the positions of `inverse`, antialiased at twice the size."""
        _, _, height, width = images.shape
        taps, reach = self._geom_taps, self._geom_taps.numel() // 4
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=images.device)
        corners = torch.tensor([[-1., -1.], [1., -1.], [1., 1.], [-1., 1.]],
                               device=images.device) * half
        seen = corners @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]    # [N, 4, 2]
        # How far the batch looks beyond the picture, and the filter beyond that.
        before = (-seen - half).amax((0, 1)) + 2 * reach
        after = (seen - half).amax((0, 1)) + 2 * reach
        left, top, right, bottom = (
            int(v) for v in torch.cat([before, after]).clamp(min=0).ceil().tolist())
        left, right = min(left, width - 1), min(right, width - 1)
        top, bottom = min(top, height - 1), min(bottom, height - 1)
        inverse = _fixed(_translate, (left - right) / 2, (top - bottom) / 2, images) @ inverse
        # Padding and doubling are linear maps of each axis, and as two matrix products much
        # faster than filters over three channels.
        images = _separable(images, _doubling(taps, height, top, bottom),
                            _doubling(taps, width, left, right))
        # Pixel centres of the doubled picture lie half a pixel off those of the original.
        inverse = _fixed(_scale, 2., 2., images) @ inverse @ _fixed(_scale, .5, .5, images)
        inverse = (_fixed(_translate, -.5, -.5, images) @ inverse
                   @ _fixed(_translate, .5, .5, images))

        out_h, out_w = (height + 2 * reach) * 2, (width + 2 * reach) * 2
        theta = (_fixed(_scale, 2 / images.shape[3], 2 / images.shape[2], images) @ inverse
                 @ _fixed(_scale, out_w / 2, out_h / 2, images))
        where = F.affine_grid(theta[:, :2], [images.shape[0], images.shape[1], out_h, out_w],
                              align_corners=False)
        images = _GridSample.apply(images, where)
        return _separable(images, _halving(taps, out_h), _halving(taps, out_w))

    def _color(self, draws, p):
        """[N, 4, 4] affine maps of RGB, or None."""
        if not self.names & set(COLOR):
            return None
        eye = torch.eye(4, device=draws.device)
        matrix = eye.expand(draws.n, 4, 4)
        luma = torch.tensor([1., 1., 1., 0.], device=draws.device) / math.sqrt(3)
        along = torch.outer(luma, luma)

        def gated(value, neutral):
            return torch.where(draws.gate(p), value, torch.full_like(value, neutral))

        if 'brightness' in self.names:
            shift = gated(draws.normal() * _BRIGHTNESS_STD, 0)
            moved = eye.repeat(draws.n, 1, 1)
            moved[:, :3, 3] = shift[:, None]
            matrix = moved @ matrix
        if 'contrast' in self.names:
            factor = gated(torch.exp2(draws.normal() * _CONTRAST_STD), 1)
            diagonal = torch.cat([factor[:, None].expand(-1, 3), torch.ones_like(factor[:, None])],
                                 1)
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

    def _filter(self, images, draws, p):
        """Scales four frequency bands of each image, keeping the expected power."""
        n, channels, height, width = images.shape
        power = torch.tensor(_BAND_POWER, device=images.device)
        gains = torch.ones(n, 4, device=images.device)
        for band in range(4):
            gate, value = draws.gate(p), torch.exp2(draws.normal() * _FILTER_STD)
            one = torch.ones(n, 4, device=images.device)
            one[:, band] = torch.where(gate, value, torch.ones_like(value))
            gains = gains * one * (power * one.square()).sum(1, keepdim=True).rsqrt()
        taps = (gains @ self._bands).repeat_interleave(channels, 0)    # [N*C, taps]
        reach = taps.shape[1] // 2
        x = images.reshape(1, n * channels, height, width)
        mode = 'reflect' if reach < min(height, width) else 'replicate'
        x = F.pad(x, (reach,) * 4, mode=mode)
        x = F.conv2d(x, taps[:, None, None, :], groups=n * channels)
        x = F.conv2d(x, taps[:, None, :, None], groups=n * channels)
        return x.reshape(n, channels, height, width)

    def _cutout(self, images, draws, p):
        height, width = images.shape[2:]
        size = draws.gate(p).float()[:, None] * _CUTOUT_SIZE
        centre = draws.uniform(2)
        x = (torch.arange(width, device=images.device) + 0.5) / width
        y = (torch.arange(height, device=images.device) + 0.5) / height
        inside_x = (x - centre[:, :1]).abs() < size / 2    # [N, W]
        inside_y = (y - centre[:, 1:]).abs() < size / 2    # [N, H]
        return images * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])


def _shift(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`images` moved by whole pixels, reflected at the edges: what _warp does, without filters."""
    height, width = images.shape[2:]
    most = [int(_XINT_MAX * width + 0.5), int(_XINT_MAX * height + 0.5)]
    padded = F.pad(images, (most[0], most[0], most[1], most[1]), mode='reflect')
    starts = (inverse[:, :2, 2].round().long() + torch.tensor(most, device=images.device)).tolist()
    return torch.stack([picture[:, y:y + height, x:x + width]
                        for picture, (x, y) in zip(padded, starts)])


class AdaptiveStrength:
    """Moves the augmentation strength p so that E[sign(D(real))] stays at `target`.

    adjust_kimg: thousands of images over which p can go from 0 to 1. p stays in
    [0, MAX_STRENGTH]. Source: ADA, section 2.2, equation 1 (r_t).
    """

    def __init__(self, *, target=0.6, adjust_kimg=500, p=0.0):
        self.target, self.adjust_kimg, self.p = target, adjust_kimg, p
        self.overfitting = 0.0    # r_t of the last update

    def update(self, mean_sign, n_images):
        """One adjustment after `n_images` real images with mean sign `mean_sign`; returns p."""
        self.overfitting = float(mean_sign)
        step = n_images / (self.adjust_kimg * 1000)
        self.p += float(np.sign(self.overfitting - self.target)) * step
        self.p = min(max(self.p, 0.0), MAX_STRENGTH)
        return self.p


class _GridSample(torch.autograd.Function):
    """Bilinear F.grid_sample with derivatives of any order with respect to the images.

    PyTorch before 2.13 has no second derivative of its own, which R1 needs.
    """

    @staticmethod
    def forward(ctx, images, where):
        ctx.save_for_backward(images, where)
        return F.grid_sample(images, where, mode='bilinear', padding_mode='zeros',
                             align_corners=False)

    @staticmethod
    def backward(ctx, grad):
        return _GridSampleTranspose.apply(grad, *ctx.saved_tensors), None


class _GridSampleTranspose(torch.autograd.Function):
    """The transpose of the (linear) sampling; the transpose of that is sampling again."""

    @staticmethod
    def forward(ctx, grad, images, where):
        ctx.save_for_backward(where)
        # 0, 0: bilinear interpolation, zero padding; the mask skips the positions' gradient.
        return torch.ops.aten.grid_sampler_2d_backward(grad, images, where, 0, 0, False,
                                                       [True, False])[0]

    @staticmethod
    def backward(ctx, grad):
        where, = ctx.saved_tensors
        return _GridSample.apply(grad, where), None, None


def _matrices(rows, like):
    flat = [v if isinstance(v, torch.Tensor) else torch.full_like(like, v)
            for row in rows for v in row]
    return torch.stack(flat, -1).reshape(*like.shape, len(rows), len(rows))


def _translate(x, y):
    return _matrices([[1., 0., x], [0., 1., y], [0., 0., 1.]], x)


def _scale(x, y):
    return _matrices([[x, 0., 0.], [0., y, 0.], [0., 0., 1.]], x)


def _rotate(angle):
    cos, sin = angle.cos(), angle.sin()
    return _matrices([[cos, -sin, 0.], [sin, cos, 0.], [0., 0., 1.]], angle)


def _fixed(make, x, y, like):
    """One [3, 3] matrix for the whole batch."""
    return make(torch.tensor(x, device=like.device), torch.tensor(y, device=like.device))


def _rotate_about(axis, angle):
    """Rodrigues' rotation about a unit axis [3] by angles [N], as [N, 4, 4]."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0., -z, y], [z, 0., -x], [-y, x, 0.]], device=angle.device)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = torch.eye(4, device=angle.device).repeat(angle.shape[0], 1, 1)
    turn[:, :3, :3] = (cos * torch.eye(3, device=angle.device) + sin * cross
                       + (1 - cos) * torch.outer(axis, axis))
    return turn


def _separable(images, rows, columns):
    """rows [H', H] and columns [W', W] applied to [N, C, H, W] -> [N, C, H', W']."""
    return rows @ (images @ columns.T)


def _doubling(taps, n, before, after):
    """[2*(n + before + after), n]: reflect-pad an axis, insert zeros, filter with gain 2."""
    eye = F.pad(torch.eye(n, device=taps.device)[None], (before, after), mode='reflect')
    half = taps.numel() // 2
    # Each row is the image of one sample; of the doubled rows only the even ones hold any.
    return upfirdn2d(eye[None], 2 * taps[None, :], up=2, pad=(half, half - 1, 0, 0))[0, 0, ::2].T


def _halving(taps, n):
    """[(n - 4*reach)/2, n]: the flipped filter and every second sample, the margin cropped."""
    reach = taps.numel() // 4
    crop = taps.numel() // 2 - 1 - 2 * reach
    eye = torch.eye(n, device=taps.device)[None, None]
    return upfirdn2d(eye, taps.flip(0)[None, :], pad=(crop, crop, 0, 0))[0, 0, :, ::2].T


def _filter_bank():
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
        bank[i, start:start + high2.size] += high2
    return bank
