"""Pictures of a release: their one form, and whether they are those that were recorded."""

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import MAX_PICTURE, Fault, read_regular
from anonymization.audit.maps import Features, features
from anonymization.audit.png import decode, encode
from anonymization.release import png_encoder

FORM = 'every picture has the canonical form and holds nothing but its pixels'
MADE = 'every picture is the one that the optimisation made'


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture file: hashes of its bytes and pixels, features, or what is wrong with it."""

    name: str
    sha256: str | None = None
    pixels: str | None = None
    features: Features | None = None
    fault: str | None = None
    canonical: bool = False  # re-encoding gives the same bytes


def look_at(
    release: Path, names: Sequence[str], size: int | None, *, with_features: bool = False
) -> list[Picture]:
    """Reads images/<name>.png of each name; size: wanted side in px, None for any square."""

    def one(name: str) -> Picture:
        try:
            data = read_regular(release / 'images' / f'{name}.png', MAX_PICTURE)
        except Fault as fault:
            return Picture(name, fault=str(fault))
        digest = hashlib.sha256(data).hexdigest()
        try:
            pixels = decode(data, size)
        except Fault as fault:
            return Picture(name, digest, fault=str(fault))
        return Picture(
            name,
            digest,
            pixel_digest(pixels),
            features(pixels) if with_features else None,
            canonical=encode(pixels) == data,
        )

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, names))


def pixel_digest(pixels: UInt8[np.ndarray, 'R R 3']) -> str:
    """SHA-256 of uint8 [R, R, 3]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def check_form(pictures: Sequence[Picture], encoder: str | None) -> Check:
    """encoder: what compressed the pictures, as the manifest or the run record says."""
    found = Findings(FORM)
    for picture in pictures:
        if picture.fault:
            found.add(f'a picture {picture.fault}', [picture.name])
        elif not picture.canonical and encoder == png_encoder():
            found.add(
                'a picture has other bytes than the encoder writes for its pixels', [picture.name]
            )
    if not pictures:
        found.add('there are no pictures')
    odd = sum(not p.canonical for p in pictures)
    return found.check(
        f'{len(pictures)} pictures'
        + (
            f'; {odd} could not be compared byte by byte, since they were compressed by '
            f'{encoder} and this is {png_encoder()}'
            if odd
            else ''
        )
    )


def check_made(pictures: Sequence[Picture], recorded: dict[str, str]) -> Check:
    """The pixels of each picture against the digests of pictures.json."""
    found = Findings(MADE)
    there = {p.name: p.pixels for p in pictures}
    if missing := sorted(recorded.keys() - there.keys()):
        found.add(f'{len(missing)} recorded pictures are not expected here', missing)
    for name, pixels in there.items():
        if pixels is None or recorded.get(name) != pixels:
            found.add('a picture differs from the one recorded', [name])
    return found.check(f'{len(pictures)} pictures with the recorded pixels')
