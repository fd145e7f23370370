"""The two operations StyleGAN2 adds to PyTorch: FIR resampling and bias + activation."""

from models.stylegan2.op.fused_act import fused_leaky_relu
from models.stylegan2.op.upfirdn2d import upfirdn2d

__all__ = ['fused_leaky_relu', 'upfirdn2d']
