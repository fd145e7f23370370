"""The one form of a picture in a release: PNG, 8-bit RGB, the bytes of this tool's encoder.

A PNG has room for more than a picture: chunks, bytes after the end or inside the compressed
stream, an alpha channel, low bytes of 16 bits, the choice of compression. Each is refused.
"""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from anonymization.audit.files import Fault
from utils.errors import UserError
from utils.images import open_image

_SIGNATURE = b'\x89PNG\r\n\x1a\n'
_RGB8 = (8, 2, 0, 0, 0)  # bits, colour type, compression, filter, interlace of IHDR
MAX_SIDE = 8192


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(type, body) of each chunk. Fault for no PNG, a wrong checksum or bytes after the end."""
    if data[:8] != _SIGNATURE:
        raise Fault('is not a PNG')
    found: list[tuple[bytes, bytes]] = []
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack('>I4s', data[at : at + 8])
        body, crc = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if len(crc) < 4:
            break
        if struct.unpack('>I', crc)[0] != zlib.crc32(kind + body):
            raise Fault(f'has a wrong checksum in its {len(found) + 1}. chunk')
        found.append((kind, body))
        at += 12 + length
        if kind == b'IEND':
            break
    if not found or found[-1][0] != b'IEND':
        raise Fault('is a truncated PNG')
    if at != len(data):
        raise Fault(f'has {len(data) - at} bytes after the end of the picture')
    return found


def decode(data: bytes, size: int | None) -> UInt8[np.ndarray, 'H W 3']:
    """uint8 [size, size, 3] of a PNG with nothing in it but the picture; Fault otherwise.

    size: wanted side in pixels; None takes any up to 8192, if both sides agree.
    """
    found = chunks(data)
    kinds = [kind for kind, _ in found]
    if kinds != [b'IHDR', *[b'IDAT'] * (len(kinds) - 2), b'IEND'] or len(kinds) < 3:
        raise Fault('has other chunks than IHDR, IDAT and IEND')
    if found[-1][1] or len(found[0][1]) != 13:
        raise Fault('has bytes in IEND, or an IHDR of wrong length')
    width, height, *rest = struct.unpack('>IIBBBBB', found[0][1])
    if tuple(rest) != _RGB8:
        raise Fault('is not 8-bit RGB')
    if width != height or not 0 < width <= MAX_SIDE or size not in (None, width):
        raise Fault(f'is not {size or "a square of at most 8192"} px wide and high')
    stream = zlib.decompressobj()
    want = height * (1 + 3 * width)
    try:
        raw = stream.decompress(b''.join(body for _, body in found[1:-1]), want + 1)
    except zlib.error as error:
        raise Fault('does not decompress') from error
    if len(raw) != want or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise Fault('holds more or fewer bytes than its pixels need')
    try:
        with open_image(lambda: io.BytesIO(data)) as image:
            return np.array(image)
    except UserError as error:
        raise Fault('does not decode') from error


def encode(pixels: UInt8[np.ndarray, 'H W 3']) -> bytes:
    """The PNG that this tool writes for uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format='PNG')
    return buffer.getvalue()
