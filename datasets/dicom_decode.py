"""Compressed pixels of DICOM files, decoded so that a damaged file cannot end the program.

gdcm ends its process on some damaged streams. So Pillow decodes what it can, and what only gdcm
can (lossless JPEG, JPEG-LS, 12 bits) is decoded in a process of its own.
"""

import io
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

if TYPE_CHECKING:
    from pydicom import Dataset

_SECONDS = 120
_BYTES = 4 << 30  # of memory in that process
_SURVIVE = ('pydicom', 'pillow', 'pylibjpeg')  # pydicom's names of decoders that raise


def decode_pixels(path: Path, dataset: 'Dataset') -> Num[np.ndarray, 'H W *c']:
    """Samples [H, W] or [H, W, 3] of `dataset`, which was read from `path`.

    Raises what the decoders raise, in any form; RuntimeError when the process of its own failed.
    """
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return pixel_array(dataset)
    plugins = get_decoder(syntax).available_plugins
    for plugin in (p for p in _SURVIVE if p in plugins):
        try:
            return pixel_array(dataset, decoding_plugin=plugin)
        except Exception:
            if 'gdcm' not in plugins:
                raise
    return _decode_apart(path) if 'gdcm' in plugins else pixel_array(dataset)


def _decode_apart(path: Path) -> Num[np.ndarray, 'H W *c']:
    command = [sys.executable, '-m', 'datasets.dicom_decode', str(Path(path).resolve())]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], capture_output=True, timeout=_SECONDS
    )
    if done.returncode:
        last = done.stderr.decode(errors='replace').strip().splitlines()[-1:]
        raise RuntimeError(f'gdcm failed: {"".join(last)}')
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


def _main(path: str) -> None:
    import pydicom
    from pydicom.pixels import pixel_array

    if sys.platform == 'linux':
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    found = io.BytesIO()
    np.save(found, pixel_array(pydicom.dcmread(path), decoding_plugin='gdcm'))
    sys.stdout.buffer.write(found.getvalue())


if __name__ == '__main__':
    _main(sys.argv[1])
