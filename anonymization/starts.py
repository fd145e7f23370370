"""Secret starts: a perturbation of every group's first latent that nobody outside can repeat.

It is noise in all directions (`start_noise`), or calibrated noise on a few (`epsilon`,
anonymization.calibrated). Without it a picture follows from its members' photographs, the networks
and the settings, so that whoever has all of these can try who completes a group. The key is 32
bytes of the system's randomness, in private/; with the same key the same run gives the same bytes.
"""

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64
from scipy.special import ndtri
from torch import Tensor

from utils.errors import UserError
from utils.io import check_intact, has_seal, sealing, write_text

KEY = 'start.key'  # 64 hexadecimal digits
_BYTES = 32


def read_key(private: Path, given: str | Path | None) -> bytes:
    """The key of a run, drawn where none is given and none is there yet, and kept in `private`.

    UserError for a file that holds none, and another key than the run began with.
    """
    path = private / KEY
    wanted = None if given is None else parse_key(Path(given))
    if not has_seal(path):
        with sealing(path):
            write_text(path, (wanted or secrets.token_bytes(_BYTES)).hex() + '\n')
    check_intact(path, remedy='start the run anew in another folder: its key is lost')
    key = parse_key(path)
    if wanted not in (None, key):
        raise UserError(f'`start_key` {given}: the run in {private} began with another key')
    return key


def parse_key(path: Path) -> bytes:
    """The key in a file; UserError when there is none."""
    try:
        key = bytes.fromhex(path.read_text(encoding='ascii').strip())
    except (OSError, ValueError) as error:
        raise UserError(f'`start_key` {path}: not a file of 64 hexadecimal digits') from error
    if len(key) != _BYTES:
        raise UserError(f'`start_key` {path}: not a file of 64 hexadecimal digits')
    return key


def start_offset(
    key: bytes, members: Sequence[str], shape: Sequence[int], scale: float
) -> Float32[Tensor, 'L D']:
    """Normal noise of deviation `scale` that the key and the members (ids, in any order) decide."""
    text = '\n'.join(sorted(members)).encode()
    digest = hashlib.sha256(key + hashlib.sha256(text).digest()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, 'big'))
    return torch.from_numpy((scale * rng.standard_normal(tuple(shape))).astype(np.float32))


def secret_normals(key: bytes, context: bytes, n: int) -> Float64[np.ndarray, ' n']:
    """`n` standard normal numbers that the key and the context decide.

    Without the key they are as good as independent of all that was drawn under other contexts,
    and cannot be told from chance (SHAKE-256 as a pseudo-random function).
    """
    drawn = hashlib.shake_256(key + hashlib.sha256(context).digest()).digest(8 * n)
    whole = np.frombuffer(drawn, '<u8') >> np.uint64(12)  # 52 bits, so that a half can be added
    return ndtri((whole + 0.5) / 2**52)
