"""Bias, leaky ReLU, gain and clamp as one step."""
import torch.nn.functional as F

SQRT2 = 2 ** 0.5


def fused_leaky_relu(x, bias=None, *, slope=0.2, gain=SQRT2, clamp=None, impl='auto'):
    """gain * leaky_relu(x + bias, slope), clamped to [-clamp, clamp] when given.

    x: [N, C, ...], any float dtype and layout. bias: [C] or None. impl: 'auto' or 'ref', the
    PyTorch path; any device, first and second derivatives. Returns x's shape and dtype.
    Raises ValueError when the bias does not fit. Source: StyleGAN2, section 2 (activation
    scaled by sqrt(2) to keep the variance).
    """
    if impl not in ('auto', 'ref'):
        raise ValueError(f'impl={impl!r}, want auto or ref')
    return _fused_leaky_relu_ref(x, bias, slope, gain, clamp)


def _fused_leaky_relu_ref(x, bias, slope, gain, clamp):
    if bias is not None:
        if bias.ndim != 1 or bias.shape[0] != x.shape[1]:
            raise ValueError(f'bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}')
        x = x + bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    x = F.leaky_relu(x, slope) * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
