"""Pictures slipped into a release, and payloads hidden in a picture file.

Each kind is a function of a Spoiled run, made consistent as a careful insider would do it.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps, PngImagePlugin
from release_fixture import Spoiled
from scipy.ndimage import gaussian_filter

from models.psp import load_psp
from utils.images import load_rgb, save_png, tensor_to_pil

ID, OTHER_ID = 'eye007x', 'eye008x'
Kind = Callable[[Spoiled], Any]
PICTURES: dict[str, Kind] = {}

# -- pictures slipped in --------------------------------------------------------------------


def _u8(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _floats(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format='JPEG', quality=quality)
    return load_rgb(buffer)


def _crop(image: Image.Image, share: float) -> Image.Image:
    margin = round(share * image.width / 2)
    return image.crop((margin, margin, image.width - margin, image.height - margin)).resize(
        image.size, Image.Resampling.BICUBIC
    )


def _pad(image: Image.Image, share: float) -> Image.Image:
    return ImageOps.expand(image, round(share * image.width)).resize(image.size)


def _shift(image: Image.Image, pixels: int) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, pixels, 0, 1, pixels))


def _gamma(image: Image.Image, power: float) -> Image.Image:
    return _u8(255 * (_floats(image) / 255) ** power)


def _noise(image: Image.Image, sigma: float) -> Image.Image:
    return _u8(_floats(image) + np.random.default_rng(0).normal(0, sigma, (*image.size, 3)))


def _ben_graham(image: Image.Image) -> Image.Image:
    x = _floats(image)
    return _u8(4 * (x - gaussian_filter(x, (image.width / 30, image.width / 30, 0))) + 128)


def _hue(image: Image.Image) -> Image.Image:
    h, s, v = image.convert('HSV').split()
    return Image.merge('HSV', (h.point(lambda x: (x + 40) % 256), s, v)).convert('RGB')


def _perspective(image: Image.Image) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, (1.05, 0.04, -1, 0.02, 1.04, -1, 1e-3, 1e-3)
    )


def _disc(image: Image.Image, other: Image.Image) -> Image.Image:
    mask = Image.new('L', image.size)
    side = image.width
    ImageDraw.Draw(mask).ellipse((side // 4, side // 4, side // 2, side // 2), fill=255)
    return Image.composite(image, other, mask)


def _thumbnail(image: Image.Image, other: Image.Image) -> Image.Image:
    other = other.copy()
    other.paste(image.resize((16, 16)), (0, 0))
    return other


def _mosaic(images: list[Image.Image]) -> Image.Image:
    side = images[0].width // 2
    sheet = Image.new('RGB', images[0].size)
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, side)), (side * (i % 2), side * (i // 2)))
    return sheet


_T = Image.Transpose
_WHITE = np.array([1.2, 1.0, 0.7])
DISGUISES: dict[str, Callable[[Image.Image], Image.Image]] = {
    'as it is': lambda x: x,
    'mirrored': lambda x: x.transpose(_T.FLIP_LEFT_RIGHT),
    'upside down': lambda x: x.transpose(_T.FLIP_TOP_BOTTOM),
    'transposed': lambda x: x.transpose(_T.TRANSPOSE),
    **{
        f'turned by {a}': (lambda x, a=a: x.rotate(a, Image.Resampling.BICUBIC))
        for a in (5, 10, 20, 45, 90, 180, 270)
    },
    **{f'cropped by {p}': (lambda x, p=p: _crop(x, p)) for p in (0.05, 0.1, 0.2)},
    'padded': lambda x: _pad(x, 0.1),
    **{f'shifted by {s}': (lambda x, s=s: _shift(x, s)) for s in (1, 2, 3, 5)},
    **{f'gamma {g}': (lambda x, g=g: _gamma(x, g)) for g in (0.4, 0.6, 1.5, 2.2)},
    'channels swapped': lambda x: Image.merge('RGB', x.split()[::-1]),
    'grey': lambda x: x.convert('L').convert('RGB'),
    'negative': ImageOps.invert,
    'white balance': lambda x: _u8(_floats(x) * _WHITE),
    'hue': _hue,
    'colour jitter': lambda x: ImageEnhance.Color(ImageEnhance.Contrast(x).enhance(1.3)).enhance(
        0.5
    ),
    'equalised': ImageOps.equalize,
    'autocontrast': ImageOps.autocontrast,
    'posterised': lambda x: ImageOps.posterize(x, 2),
    'solarised': ImageOps.solarize,
    'Ben Graham': _ben_graham,
    **{f'noise {s}': (lambda x, s=s: _noise(x, s)) for s in (10, 20, 40)},
    **{f'JPEG {q}': (lambda x, q=q: _jpeg(x, q)) for q in (60, 30, 10, 3)},
    **{f'blurred by {s}': (lambda x, s=s: x.filter(ImageFilter.GaussianBlur(s))) for s in (2, 4)},
    'perspective': _perspective,
}


def slip_in(spoiled: Spoiled, picture: Image.Image) -> None:
    """Puts a picture in place of the first one."""
    save_png(picture, spoiled.pictures[0])
    spoiled.seal()


def reconstruction(spoiled: Spoiled, rows: list[int]) -> Image.Image:
    """What the generator draws for the mean latent of some photographs."""
    latents = np.load(spoiled.private / 'latents.npy')[rows].mean(0)
    with torch.no_grad():
        image = load_psp(spoiled.networks / 'psp.pt').decode(torch.from_numpy(latents)[None])
    return tensor_to_pil(image[0])


for _name, _disguise in DISGUISES.items():
    PICTURES[_name] = lambda s, d=_disguise: slip_in(s, d(s.photograph()))


def _swap(spoiled: Spoiled) -> None:
    first, second = spoiled.pictures[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    spoiled.seal()


PICTURES |= {
    'half and half': lambda s: slip_in(
        s, _u8(np.concatenate([_floats(s.photograph())[:16], _floats(s.photograph(OTHER_ID))[16:]]))
    ),
    'blend of 50': lambda s: slip_in(s, Image.blend(s.photograph(), s.photograph(OTHER_ID), 0.5)),
    'blend of 60 with the picture': lambda s: slip_in(
        s, Image.blend(s.photograph(), load_rgb(s.pictures[0]), 0.4)
    ),
    'mosaic': lambda s: slip_in(s, _mosaic([s.photograph(f'eye00{i}x') for i in range(4)])),
    'disc pasted': lambda s: slip_in(s, _disc(s.photograph(), load_rgb(s.pictures[0]))),
    'thumbnail': lambda s: slip_in(s, _thumbnail(s.photograph(), load_rgb(s.pictures[0]))),
    'reconstruction of one photograph': lambda s: slip_in(s, reconstruction(s, [7])),
    'mean of two eyes of one person': lambda s: slip_in(s, reconstruction(s, [6, 7])),
    'all black': lambda s: slip_in(s, Image.new('RGB', s.photograph().size)),
    'one picture twice': lambda s: slip_in(s, load_rgb(s.pictures[1])),
    'two pictures swapped': _swap,
}


# -- payloads in a picture file -------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def _png(
    pixels: np.ndarray,
    *,
    before: bytes = b'',
    stream: bytes | None = None,
    after: bytes = b'',
    end: bytes = b'',
    level: int = 6,
    header: tuple = (8, 2, 0, 0, 0),
) -> bytes:
    height, width = pixels.shape[:2]
    raw = b''.join(b'\0' + row.tobytes() for row in pixels)
    stream = zlib.compress(raw, level) if stream is None else stream
    ihdr = struct.pack('>IIBBBBB', width, height, *header)
    return (
        b'\x89PNG\r\n\x1a\n'
        + _chunk(b'IHDR', ihdr)
        + before
        + _chunk(b'IDAT', stream)
        + after
        + _chunk(b'IEND', end)
    )


def _payload(**parts: Any) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.pictures[0]
        path.write_bytes(_png(np.array(Image.open(path)), **parts))
        spoiled.seal()

    return spoil


def _raw(change: Callable[[bytes], bytes]) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.pictures[0]
        path.write_bytes(change(path.read_bytes()))
        spoiled.seal()

    return spoil


def _saved(change: Callable[[Spoiled, Image.Image], Image.Image], **options: Any) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.pictures[0]
        with Image.open(path) as image:
            picture = change(spoiled, image.copy())
        picture.save(path, **{'format': 'PNG', **options})
        spoiled.seal()

    return spoil


def _in_stream(spoiled: Spoiled, extra: bytes, *, inside: bool) -> None:
    """Bytes after the pixels, within the compressed stream or behind its end."""
    path = spoiled.pictures[0]
    pixels = np.array(Image.open(path))
    raw = b''.join(b'\0' + row.tobytes() for row in pixels)
    stream = zlib.compress(raw + extra) if inside else zlib.compress(raw) + extra
    path.write_bytes(_png(pixels, stream=stream))
    spoiled.seal()


def _low_bits(bits: int) -> Kind:
    def hide(spoiled: Spoiled, image: Image.Image) -> Image.Image:
        shown, hidden = np.asarray(image), np.asarray(spoiled.photograph())
        return Image.fromarray((shown >> bits << bits) | (hidden >> (8 - bits)))

    return _saved(hide)


def _alpha(spoiled: Spoiled, image: Image.Image) -> Image.Image:
    image.putalpha(spoiled.photograph().convert('L'))
    return image


def _transparent(image: Image.Image) -> Image.Image:
    image.putalpha(0)
    return image


def _sixteen_bits(spoiled: Spoiled) -> None:
    path = spoiled.pictures[0]
    shown = np.asarray(Image.open(path)).astype('>u2')
    wide = (shown << 8 | np.asarray(spoiled.photograph())).astype('>u2')
    path.write_bytes(_png(wide, header=(16, 2, 0, 0, 0)))
    spoiled.seal()


def _zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('who.txt', ID)
    return buffer.getvalue()


def _text_chunk(spoiled: Spoiled) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text('Comment', f'made from {ID}')
    _saved(lambda s, x: x, pnginfo=info)(spoiled)


def _exif(spoiled: Spoiled) -> None:
    exif = Image.Exif()
    exif[0x010E] = ID
    _saved(lambda s, x: x, exif=exif)(spoiled)


_WHO = ID.encode()
PAYLOADS: dict[str, Kind] = {
    'text chunk': _text_chunk,
    'exif': _exif,
    'after the end': _raw(lambda data: data + _WHO),
    'behind the stream': lambda s: _in_stream(s, _WHO, inside=False),
    'inside the stream': lambda s: _in_stream(s, _WHO, inside=True),
    'photograph inside the stream': lambda s: _in_stream(
        s, (s.photographs / f'{ID}.png').read_bytes(), inside=True
    ),
    'ZIP behind the stream': lambda s: _in_stream(s, _zip_bytes(), inside=False),
    'in IEND': _payload(end=_WHO),
    'palette': _payload(before=_chunk(b'PLTE', (_WHO * 110)[:768])),
    'wrong checksum': _raw(lambda data: data[:-2] + b'xx'),
    'other compression': _payload(level=1),
    'stored, not compressed': _payload(level=0),
    'empty IDAT': _payload(after=_chunk(b'IDAT', b'')),
    'alpha channel': _saved(_alpha),
    'under transparent pixels': _saved(lambda s, x: _transparent(s.photograph())),
    'low byte of 16 bits': _sixteen_bits,
    '2 low bits': _low_bits(2),
    '4 low bits': _low_bits(4),
    'grey picture': _saved(lambda s, x: x.convert('L')),
    'palette picture': _saved(lambda s, x: x.quantize(64)),
    'JPEG named png': _saved(lambda s, x: x, format='JPEG'),
    'larger': _saved(lambda s, x: x.resize((64, 64))),
    'cut short': _raw(lambda data: data[:-20]),
    'empty': _raw(lambda data: b''),
}
