"""Images as files, PIL pictures and tensors. Tensors are float32 RGB in [-1, 1]."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Num, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.errors import UserError
from utils.io import atomic_path

CONTACT_SHEET = 'grid.png'  # beside the pictures of scripts/generate.py, not one of them
# Pillow looks at the content, not at the suffix, and would run a PostScript program (EPS). MPO,
# several JPEGs in one file, comes with JPEG.
_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'PPM', 'WEBP')
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.ppm', '.webp')


def to_uint8(img: Float[Tensor, '*N H W']) -> UInt8[Tensor, '*N H W']:
    """Float [..., H, W] in [-1, 1] -> uint8, rounded and clamped."""
    return img.detach().float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(u8: Num[Tensor, '*N']) -> Float32[Tensor, '*N']:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return u8.float().div(127.5).sub(1)


def as_rgb(image: Image.Image, at_least: int | None = None) -> Image.Image:
    """Any PIL image -> RGB: EXIF orientation applied, 16-bit scaled to 8, alpha over black.

    at_least: a JPEG is decoded at the smallest of its scales (1/8, 1/4, 1/2, 1) that leaves both
    sides as long, which takes a fraction of the time; None decodes it whole.
    """
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files come as I;16 or I; anything that fits 8 bits is left unscaled.
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(np.rint(values / scale), 0, 255).astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, (0, 0, 0, 255)), image)
    return image if image.mode == 'RGB' else image.convert('RGB')  # copies of 40 MB cost time


def decode_reason(error: BaseException) -> str:
    """Why a picture could not be decoded, in one line, without Python's words for open files."""
    if isinstance(error, UnidentifiedImageError):
        return f'empty, or of no known image format ({", ".join(_FORMATS)})'
    text = ' '.join(str(error).split())
    if isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
        return text
    return f'{type(error).__name__} {text}'


@contextlib.contextmanager
def open_image(
    source: str | Path | Callable[[], BinaryIO], name: str | None = None
) -> Iterator[Image.Image]:
    """An opened PIL picture of one of the formats this project reads; the only way to open one.

    source: a path, or a function that opens a file. Whatever goes wrong in the block becomes a
    UserError that calls the picture by `name` (default: the path), with the reason as its cause.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(source()) if callable(source) else source
            yield stack.enter_context(Image.open(file, formats=_FORMATS))
    except UserError:
        raise
    except Exception as error:  # damaged bytes make the decoders fail in any way
        raise UserError(
            f'{name or source} is not a readable image ({decode_reason(error)}); '
            'replace or remove it'
        ) from error


def load_rgb(path: str | Path, at_least: int | None = None) -> Image.Image:
    """Reads any common image file as a PIL RGB picture; UserError when it cannot be decoded.

    at_least: as in `as_rgb`.
    """
    with open_image(path) as image:
        return as_rgb(image, at_least)


def resize(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """PIL picture -> `size` x `size`, antialiased, aspect ratio not kept; bilinear is published.

    Large RGB pictures as `resize_pixels` does.
    """
    if image.size == (size, size):
        return image
    if resample == Image.Resampling.BILINEAR and image.mode == 'RGB' and min(image.size) > 2 * size:
        return Image.fromarray(resize_pixels(np.array(image), size))
    return image.resize((size, size), resample)


def resize_pixels(
    pixels: UInt8[np.ndarray, 'H W 3'],
    size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> UInt8[np.ndarray, '{size} {size} 3']:
    """`resize` of an RGB array.

    Of large pictures the bilinear way is PyTorch's form of Pillow's, in a third of the time; a
    few values of a thousand differ by one grey level.
    """
    if resample != Image.Resampling.BILINEAR or min(pixels.shape[:2]) <= 2 * size:
        return np.asarray(resize(Image.fromarray(pixels), size, resample))
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = F.interpolate(channels, (size, size), mode='bilinear', antialias=True)[0]
    return small.permute(1, 2, 0).numpy()


def shrink(img: Float[Tensor, 'N C H W'], side: int) -> Float[Tensor, 'N C {side} {side}']:
    """[N, C, H, W] -> [N, C, side, side], the mean over each cell.

    Where cells are equal, by an operation whose gradient has a deterministic form on GPUs.
    """
    if img.shape[-2] == img.shape[-1] and img.shape[-1] % side == 0:
        return F.avg_pool2d(img, img.shape[-1] // side)
    return F.adaptive_avg_pool2d(img, side)


def pil_to_tensor(image: Image.Image) -> Float32[Tensor, '3 H W']:
    """PIL RGB -> float32 [3, H, W] in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def tensor_to_pil(img: Float[Tensor, '3 H W']) -> Image.Image:
    """Float [3, H, W] in [-1, 1] -> PIL RGB."""
    return Image.fromarray(to_uint8(img).permute(1, 2, 0).cpu().numpy())


def load_tensor(path: str | Path, size: int) -> Float32[Tensor, '3 {size} {size}']:
    """Reads a picture as float32 [3, size, size] in [-1, 1]."""
    return pil_to_tensor(resize(load_rgb(path), size))


def save_png(img: Image.Image | Float[Tensor, '3 H W'], path: str | Path) -> None:
    """Writes a PIL picture, or a float [3, H, W] tensor in [-1, 1], as a PNG without metadata.

    The bytes depend on the pixels alone.
    """
    if isinstance(img, torch.Tensor):
        img = tensor_to_pil(img)
    clean = Image.fromarray(np.array(img))  # a fresh picture carries no info chunks along
    with atomic_path(path) as temp:
        clean.save(temp, format='PNG')


def grid(
    imgs: Float[Tensor, 'N C H W'], n_cols: int, pad: int = 2, fill: float = -1.0
) -> Float[Tensor, 'C h w']:
    """Lays out [N, C, H, W] as one [C, rows*(H+pad)+pad, cols*(W+pad)+pad] picture."""
    n, c, h, w = imgs.shape
    n_rows = -(-n // n_cols)
    sheet = imgs.new_full((c, n_rows * (h + pad) + pad, n_cols * (w + pad) + pad), fill)
    for i in range(n):
        y, x = pad + (i // n_cols) * (h + pad), pad + (i % n_cols) * (w + pad)
        sheet[:, y : y + h, x : x + w] = imgs[i]
    return sheet


def strip_suffix(name: str) -> str:
    """A name without the suffix of an image file, if it has one; other dots belong to the name."""
    stem, dot, suffix = name.rpartition('.')
    return stem if stem and f'{dot}{suffix}'.lower() in IMAGE_SUFFIXES else name


def png_names(names: Sequence[str]) -> list[str]:
    """File names `<name>.png`, all distinct (in any case of letters), for pictures of these names.

    Slashes become `__`, image suffixes are dropped; names that would collide keep theirs, and
    what still collides gets a number.
    """
    flat = [name.replace('/', '__') for name in names]
    times = Counter(strip_suffix(name).lower() for name in flat)
    found, taken = [], set()
    for name in flat:
        stem = strip_suffix(name)
        base = unique = stem if times[stem.lower()] == 1 else name
        number = 1
        while unique.lower() in taken:
            number += 1
            unique = f'{base}~{number}'
        taken.add(unique.lower())
        found.append(f'{unique}.png')
    return found


def find_images(folder: str | Path) -> list[Path]:
    """All image files below `folder`, sorted; UserError when there is no folder or no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'image folder not found: {folder}')
    found = sorted(
        p for p in folder.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    )
    if not found:
        raise UserError(f'no images ({", ".join(IMAGE_SUFFIXES)}) in {folder}')
    return found
