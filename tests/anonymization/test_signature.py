"""Detached signatures of releases: made, checked, and refused where they do not fit."""

import shutil
import subprocess

import pytest
from conftest import load_script
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from PIL import Image
from release_fixture import release_facts

from anonymization.release import PAGES, GroupFacts, write_release
from anonymization.signature import SIGNED, check_signature, make_key, sign, signature_path
from utils.errors import UserError

sign_release, verify = load_script('sign_release'), load_script('verify_release')
NAMES = ['bcdfghjk', 'mnpqrstv']


@pytest.fixture
def release(tmp_path):
    """A small release that any recipient's check accepts."""
    write_release(
        tmp_path / 'release',
        [GroupFacts(n, 5, 5, (3, 2, 0, 0, 0)) for n in NAMES],
        [(n, Image.new('RGB', (8, 8), n[0] == 'b' and 'red' or 'blue')) for n in NAMES],
        facts=release_facts(),
    )
    return tmp_path / 'release'


def test_make_sign_verify(release, tmp_path, capsys):
    key = tmp_path / 'institution.pem'
    assert sign_release.main(['--make_key', str(key)]) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert verify.main([str(release)]) == 0
    assert sign_release.main([str(release), '--key', str(key)]) == 0
    assert signature_path(release).stat().st_size == 64
    assert {p.name for p in release.iterdir()} == {'images', 'manifest.json', *PAGES}
    capsys.readouterr()
    assert verify.main([str(release), '--public_key', f'{key}.pub']) == 0
    assert f'ok    {SIGNED}' in capsys.readouterr().out
    assert verify.main([str(release)]) == 0
    assert '--public_key would check it' in capsys.readouterr().out


def test_signature_elsewhere(release, tmp_path):
    public = make_key(tmp_path / 'a.pem')
    other = shutil.move(sign(release, tmp_path / 'a.pem'), tmp_path / 'x.sig')
    assert not check_signature(release, public).passed
    assert check_signature(release, public, other).passed


def test_openssl_agrees(release, tmp_path):
    if shutil.which('openssl') is None:
        pytest.skip('no openssl on this machine')
    public = make_key(tmp_path / 'a.pem')
    path = sign(release, tmp_path / 'a.pem')
    done = subprocess.run(
        [
            'openssl',
            'pkeyutl',
            '-verify',
            '-pubin',
            '-inkey',
            public,
            '-rawin',
            '-in',
            release / 'manifest.json',
            '-sigfile',
            path,
        ],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('case', ['altered', 'other key', 'cut', 'empty', 'missing', 'folder'])
def test_signature_that_does_not_fit(release, tmp_path, case, capsys):
    public = make_key(tmp_path / 'a.pem')
    path = sign(release, tmp_path / 'a.pem')
    if case == 'altered':
        (release / 'manifest.json').write_bytes((release / 'manifest.json').read_bytes() + b' ')
    elif case == 'other key':
        public = make_key(tmp_path / 'b.pem')
    elif case in ('cut', 'empty'):
        path.write_bytes(path.read_bytes()[: 63 if case == 'cut' else 0])
    else:
        path.unlink()
        if case == 'folder':
            path.mkdir()
    assert verify.main([str(release), '--public_key', str(public)]) == 1
    assert f'FAIL  {SIGNED}' in capsys.readouterr().out


def test_a_release_that_fails_is_not_signed(release, tmp_path, capsys):
    make_key(tmp_path / 'a.pem')
    (release / 'labels.csv').write_text('image\n')
    assert sign_release.main([str(release), '--key', str(tmp_path / 'a.pem')]) == 1
    assert 'not signed' in capsys.readouterr().out and not signature_path(release).exists()


def test_keys_are_not_overwritten(tmp_path):
    make_key(tmp_path / 'a.pem')
    before = (tmp_path / 'a.pem').read_bytes()
    with pytest.raises(UserError, match='never overwritten'):
        make_key(tmp_path / 'a.pem')
    assert (tmp_path / 'a.pem').read_bytes() == before


def test_files_that_are_no_key(release, tmp_path):
    def pem(key, encryption):
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    plain = serialization.NoEncryption()
    files = {
        'text': b'hello',
        'empty': b'',
        'curve': pem(ec.generate_private_key(ec.SECP256R1()), plain),
        'locked': pem(
            ed25519.Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b'x')
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            sign(release, tmp_path / name)
        with pytest.raises(UserError, match=name):
            check_signature(release, tmp_path / name)
    with pytest.raises(UserError, match='nowhere'):
        sign(release, tmp_path / 'nowhere')


@pytest.mark.parametrize(
    'flags', [[], ['RELEASE'], ['--key', 'k.pem'], ['RELEASE', '--make_key', 'k.pem']]
)
def test_wrong_flags(release, flags):
    with pytest.raises(UserError, match='--make_key'):
        sign_release.main([str(release) if f == 'RELEASE' else f for f in flags])
