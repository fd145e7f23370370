"""Material for the tests of damaged and hostile files."""

import pickle
import random

import torch

CONTENT = {
    'weights': {
        'a.weight': torch.arange(300.0).reshape(20, 15),
        'a.bias': torch.ones(20),
        'half': torch.ones(7, dtype=torch.float16),
    },
    'step': 5,
    'best': 0.25,
    'names': ['x', 'y'],
    'betas': (0.9, 0.99),
    'none': None,
}


def same(a, b):
    """Whether two nested containers hold the same values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def flips(data, *, step=1, seed=0):
    """Copies of `data` with one flipped bit, in every `step`-th byte."""
    draw = random.Random(seed)
    for i in range(0, len(data), step):
        changed = bytearray(data)
        changed[i] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def tuple_bomb(depth=60):
    """A tuple of 2^depth values in a few hundred bytes: hashing it never ends."""
    bomb = ()
    for _ in range(depth):
        bomb = (bomb, bomb)
    return bomb


def list_bomb(depth=60):
    """A list whose text would have 2^depth brackets."""
    bomb = []
    for _ in range(depth):
        bomb = [bomb, bomb]
    return bomb


def key_of_tuples():
    """The pickle of {bomb: 1} as torch's reader takes it: no names, protocol 2."""
    body = pickle.dumps(tuple_bomb(), protocol=2)
    assert body.startswith(b'\x80\x02') and body.endswith(b'.')
    return b'\x80\x02}' + body[2:-1] + b'K\x01s.'
