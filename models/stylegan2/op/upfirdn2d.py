"""Zero-insert, pad, filter, decimate: the resampling step of StyleGAN2."""
import torch.nn.functional as F


def upfirdn2d(x, kernel, *, up=1, down=1, pad=(0, 0), impl='auto'):
    """Upsamples by zero insertion, pads, applies a FIR filter, keeps every `down`-th sample.

    x: [N, C, H, W], any float dtype and layout. kernel: [kh, kw], used as a true convolution
    (flipped). up, down: whole factors for both axes. pad: (before, after) for both axes, or
    (left, right, top, bottom) in samples of the upsampled image; negative values crop.
    impl: 'auto' or 'ref', the PyTorch path; any device, first and second derivatives.
    Returns [N, C, (H*up + pads - kh)//down + 1, (W*up + pads - kw)//down + 1] in x's dtype.
    Raises ValueError on shapes or factors that do not fit. Source: StyleGAN2, appendix B.
    """
    if impl not in ('auto', 'ref'):
        raise ValueError(f'impl={impl!r}, want auto or ref')
    return _upfirdn2d_ref(x, kernel, up, down, full_pad(pad))


def full_pad(pad):
    """(before, after) or (left, right, top, bottom) -> (left, right, top, bottom)."""
    pad = tuple(int(p) for p in pad)
    if len(pad) == 2:
        pad = pad + pad
    if len(pad) != 4:
        raise ValueError(f'pad={pad}, want 2 or 4 numbers')
    return pad


def _upfirdn2d_ref(x, kernel, up, down, pad):
    if x.ndim != 4 or kernel.ndim != 2:
        raise ValueError(f'want x [N, C, H, W] and kernel [kh, kw], got {tuple(x.shape)} and '
                         f'{tuple(kernel.shape)}')
    if up < 1 or down < 1:
        raise ValueError(f'up={up} and down={down} must be 1 or more')
    channels = x.shape[1]
    kh, kw = kernel.shape
    left, right, top, bottom = pad
    if min(x.shape[2] * up + top + bottom - kh, x.shape[3] * up + left + right - kw) < 0:
        raise ValueError(f'the padded image {tuple(x.shape)} is smaller than the {kh}x{kw} kernel')
    weight = kernel.to(x.dtype)[None, None].expand(channels, 1, kh, kw)
    if up == 1:
        x = F.pad(x, pad) if any(pad) else x
        # conv2d correlates, so the kernel is flipped to give a convolution.
        return F.conv2d(x, weight.flip(2, 3), stride=down, groups=channels)
    # A strided transposed convolution is the filter over the zero-inserted image without the
    # zeros ever being stored; it starts kh-1 samples early and ends before the last zeros.
    x = F.conv_transpose2d(x, weight, stride=up, groups=channels)
    x = F.pad(x, (left - kw + 1, right - kw + up, top - kh + 1, bottom - kh + up))
    return x[:, :, ::down, ::down] if down > 1 else x
