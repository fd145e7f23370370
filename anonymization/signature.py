"""A detached Ed25519 signature of a release: the institution's word that it made these files.

The signature is over the bytes of manifest.json, which lists every other file with its SHA-256.
It stands beside the release folder as `<folder>.sig`, 64 bytes, so that the folder itself holds
nothing but what can be derived again. Needs the package `cryptography`.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import Fault, read_regular
from anonymization.release import MANIFEST
from utils.errors import UserError
from utils.io import atomic_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

SIGNED = 'the signature is that of the given key'
_MAX_KEY = 1 << 16


def signature_path(release: str | Path) -> Path:
    """Where the signature of a release folder stands: beside it, `<folder>.sig`."""
    release = Path(release).absolute()
    return release.with_name(f'{release.name}.sig')


def make_key(path: str | Path) -> Path:
    """Writes a new private key (PEM, mode 0600) to `path`; returns the public one's, `<path>.pub`.

    UserError when either file exists.
    """
    ed25519, serialization = _cryptography()
    path = Path(path)
    public = path.with_name(f'{path.name}.pub')
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise UserError(f'{file} exists; a key is never overwritten, choose another name')
    key = ed25519.Ed25519PrivateKey.generate()
    _write_private(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    with atomic_path(public) as temp:
        temp.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    return public


def _write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def sign(release: str | Path, key: str | Path) -> Path:
    """Signs manifest.json of the folder `release`; returns the path of the signature.

    key: file of the private key. Does not look at the release: check it first. UserError for a
    file that is no such key.
    """
    ed25519, serialization = _cryptography()
    try:
        private = serialization.load_pem_private_key(read_regular(Path(key), _MAX_KEY), None)
    except (ValueError, TypeError) as error:  # TypeError: the key asks for a password
        raise UserError(
            f'{key} is not an unencrypted private key in PEM form{_reason(error)}; '
            'make one with scripts/sign_release.py --make_key'
        ) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise UserError(f'{key} is not an Ed25519 key')
    path = signature_path(release)
    with atomic_path(path) as temp:
        temp.write_bytes(private.sign(_manifest(Path(release))))
    return path


def check_signature(
    release: str | Path, public_key: str | Path, signature: str | Path | None = None
) -> Check:
    """Whether manifest.json carries the signature of `public_key` (default place: `<folder>.sig`).

    UserError when the public key cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    public, found = _public_key(public_key), Findings(SIGNED)
    try:
        there = read_regular(Path(signature or signature_path(release)), _MAX_KEY)
    except Fault as fault:
        found.add(f'the signature file {fault}')
        return found.check('')
    try:
        public.verify(there, _manifest(Path(release)))
    except InvalidSignature:
        found.add('the signature does not belong to this manifest and this key')
    return found.check('Ed25519, over manifest.json')


def _public_key(path: str | Path) -> 'ed25519.Ed25519PublicKey':
    ed25519, serialization = _cryptography()
    try:
        public = serialization.load_pem_public_key(read_regular(Path(path), _MAX_KEY))
    except ValueError as error:
        raise UserError(
            f'{path} is not a public key in PEM form{_reason(error)}; ask the maker '
            'for his, or name another file'
        ) from error
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise UserError(f'{path} is not an Ed25519 key')
    return public


def _reason(error: Exception) -> str:
    return f' (it {error})' if isinstance(error, Fault) else ''


def _manifest(release: Path) -> bytes:
    try:
        return read_regular(release / MANIFEST)
    except Fault as fault:
        raise UserError(f'{release / MANIFEST} {fault}; it is what is signed') from fault


def _cryptography() -> tuple[ModuleType, ModuleType]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError(
            'signatures need the package cryptography: pip install cryptography'
        ) from None
    return ed25519, serialization
