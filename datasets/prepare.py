"""Turning collections of photographs into a training archive: transforms, and the report."""

import concurrent.futures
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from datasets.archive import ArchiveWriter
from datasets.fov import Fov, UnusableFrame, crop_fov, find_fov
from datasets.pictures import OVERSAMPLING
from datasets.sides import disc_to_the_right
from datasets.sources import SourceImage
from utils.errors import UserError, listing
from utils.images import decode_reason
from utils.io import sha256_bytes
from utils.logs import progress

log = logging.getLogger(__name__)

FILTERS = {
    'lanczos': Image.Resampling.LANCZOS,
    'box': Image.Resampling.BOX,
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
    'hamming': Image.Resampling.HAMMING,
}
TRANSFORMS = ('none', 'center-crop', 'center-crop-wide', 'fundus')


def transform_image(
    image: Image.Image,
    *,
    transform: str = 'none',
    width: int | None = None,
    height: int | None = None,
    resample: str = 'lanczos',
    mask: bool = False,
    unsqueeze: bool = False,
    fov: Fov | None = None,
) -> Image.Image:
    """PIL RGB -> PIL RGB of `width` x `height` (None: as large as it comes).

    none: plain resize. center-crop: the largest central square. center-crop-wide: the largest
    central width:height region, on a black width x width square. fundus: the field of view,
    padded to a square (UnusableFrame for near-black and blank frames); fov: where it is known.
    """
    kernel = FILTERS[resample]
    if transform == 'fundus':
        fov = fov or find_fov(image)
        return crop_fov(image, fov, size=width, mask=mask, unsqueeze=unsqueeze, resample=kernel)
    w, h = image.size
    if transform == 'center-crop':
        image = _central(image, min(w, h), min(w, h))
    elif transform == 'center-crop-wide':
        if width is None or height is None:
            raise ValueError('center-crop-wide needs a width and a height')
        scale = min(w / width, h / height)
        image = _central(image, round(width * scale), round(height * scale))
    if width is not None and height is not None and image.size != (width, height):
        image = image.resize((width, height), kernel)
    if transform == 'center-crop-wide' and width is not None and height is not None:
        canvas = Image.new('RGB', (width, width))
        canvas.paste(image, (0, (width - height) // 2))
        return canvas
    return image


def _load(item: SourceImage, transform: str, width: int | None) -> tuple[Image.Image, Fov | None]:
    """The picture with at least twice as many pixels a side as the result shows of it.

    Its field of view, where it was looked for.
    """
    if width is None:
        return Image.fromarray(item.load(None)), None
    wanted = OVERSAMPLING * width
    image = Image.fromarray(item.load(wanted))
    if transform != 'fundus':
        return image, None
    fov = find_fov(image)
    left, top, right, bottom = fov.box
    field = max(right - left, bottom - top)
    if field >= wanted or min(image.size) < wanted:  # the latter was decoded whole
        return image, fov
    # The field fills a part of the frame only.
    return Image.fromarray(item.load(-(-wanted * min(image.size) // field))), None


def _central(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_options(
    transform: str,
    width: int | None,
    height: int | None,
    *,
    mask: bool = False,
    unsqueeze: bool = False,
) -> tuple[int | None, int | None]:
    """UserError for sizes and transforms that do not go together; returns (width, height)."""
    if width is None and height is not None and transform != 'center-crop-wide':
        width = height
    if height is None and width is not None and transform != 'center-crop-wide':
        height = width
    if transform == 'center-crop-wide':
        if width is None or height is None or height > width:
            raise UserError(
                '`transform` center-crop-wide needs `width` and `height`, with height at most width'
            )
    elif width != height:
        raise UserError(
            f'`width` {width} `height` {height}: the generator takes squares only; '
            'give equal sizes, or use `transform` center-crop-wide'
        )
    if transform != 'fundus' and (mask or unsqueeze):
        raise UserError('`mask` and `unsqueeze` need `transform` fundus')
    return width, height


def build_archive(
    images: Sequence[SourceImage],
    dest: str | Path,
    *,
    transform: str = 'none',
    width: int | None = None,
    height: int | None = None,
    resample: str = 'lanczos',
    mask: bool = False,
    unsqueeze: bool = False,
    max_images: int | None = None,
    workers: int = 1,
    keep_names: bool = False,
    one_side: bool = False,
) -> pd.DataFrame:
    """Writes `images` (SourceImage list) to the archive `dest`; returns the report, a DataFrame.

    Its columns: source, name, kept, reason (why not), archive_name, label, same_as (the name of an
    earlier image with the very same pixels, which is kept too), mirrored. Damaged files and
    unusable frames are left out. keep_names: files keep their names (as .png) instead of being
    numbered. one_side: photographs whose disc lies left of the centre are mirrored. UserError
    when nothing is left, when names to be kept are not unique, or when the results are not
    squares of one power of two (listed together).
    """
    if keep_names:
        names = [_own_name(item) for item in images]
        if double := sorted(n for n, times in Counter(names).items() if times > 1):
            raise UserError(listing('`keep_names`: several images of one name', double))
    width, height = check_options(transform, width, height, mask=mask, unsqueeze=unsqueeze)
    prepare = functools.partial(
        _prepare,
        transform=transform,
        width=width,
        height=height,
        resample=resample,
        mask=mask,
        unsqueeze=unsqueeze,
        one_side=one_side,
    )
    with ArchiveWriter(dest) as writer, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        # In blocks: decoding ahead of the writer must not fill the memory.
        step = 16 * workers
        blocks = (images[i : i + step] for i in range(0, len(images), step))
        results = itertools.chain.from_iterable(
            zip(block, pool.map(prepare, block)) for block in blocks
        )
        intake = _Intake(writer, keep_names)
        for item, prepared in progress(results, total=len(images), desc='images'):
            if max_images is not None and intake.n_kept >= max_images:
                break
            intake.add(item, *prepared)
        intake.check(len(images))
    _warn(intake.rows, intake.n_kept)
    return pd.DataFrame(intake.rows)


def _own_name(item: SourceImage) -> str:
    return f'{Path(item.name).stem}.png'


def _prepare(
    item: SourceImage, *, transform: str, width: int | None, one_side: bool, **options: Any
) -> tuple[Image.Image | None, bool, str]:
    """The picture (None: unusable), whether it was mirrored, and why it is unusable."""
    try:
        image, fov = _load(item, transform, width)
        image = transform_image(image, transform=transform, width=width, fov=fov, **options)
        return *(disc_to_the_right(image) if one_side else (image, False)), ''
    except UnusableFrame as error:
        return None, False, str(error)
    except UserError as error:
        return None, False, f'damaged: {decode_reason(error.__cause__ or error)}'


class _Intake:
    """Adds pictures to an archive one by one and keeps the rows of the report."""

    def __init__(self, writer: ArchiveWriter, keep_names: bool) -> None:
        self.writer, self.keep_names = writer, keep_names
        self.rows: list[dict[str, Any]] = []
        self.n_kept = 0
        self._misfits: list[str] = []
        self._size: tuple[int, int] | None = None
        self._seen: dict[str, SourceImage] = {}

    def add(
        self, item: SourceImage, image: Image.Image | None, mirrored: bool, reason: str
    ) -> None:
        name, same_as = None, ''
        if image is None:
            log.warning('left out %s: %s (%s)', item.name, reason, item.source)
        elif self._fits(image):
            name = self.writer.add(
                image, item.label, name=_own_name(item) if self.keep_names else None
            )
            self.n_kept += 1
            first = self._seen.setdefault(sha256_bytes(image.tobytes()), item)
            same_as = '' if first is item else first.name
        else:
            self._misfits.append(f'{item.source}: {item.name}: {image.width}x{image.height}')
        self.rows.append(
            {
                'source': item.source,
                'name': item.name,
                'kept': name is not None,
                'reason': reason,
                'archive_name': name or '',
                'label': item.label,
                'same_as': same_as,
                'mirrored': mirrored,
            }
        )

    def _fits(self, image: Image.Image) -> bool:
        """Whether it is a square of a power of two, of the size of the first picture."""
        self._size = self._size or image.size
        w, h = image.size
        return w == h and not w & (w - 1) and image.size == self._size

    def check(self, n_images: int) -> None:
        """UserError when pictures did not fit, or none is left."""
        if self._misfits:
            raise UserError(
                listing(
                    f'{len(self._misfits)} of {n_images} images are not squares of one power of '
                    'two after the transform; give `width` and `height` (e.g. `width` 256 '
                    '`height` 256)',
                    self._misfits,
                )
            )
        if not self.n_kept:
            raise UserError(
                f'none of the {n_images} images can be used: '
                + '; '.join(sorted({r['reason'] for r in self.rows})[:5])
            )


def _warn(rows: Sequence[dict[str, Any]], n_kept: int) -> None:
    """Of identical pictures, and of an archive without labels because some have none."""
    if twins := [r for r in rows if r['same_as']]:
        log.warning(
            'identical pixels, kept all the same: %d times, as %s and %s; see same_as in '
            'the report',
            len(twins),
            twins[0]['name'],
            twins[0]['same_as'],
        )
    unlabelled = sum(1 for r in rows if r['kept'] and r['label'] is None)
    if 0 < unlabelled < n_kept:
        log.warning('%d of %d images have no label, so the archive has none', unlabelled, n_kept)
