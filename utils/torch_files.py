"""Checks of torch.save files that torch.load leaves out: damage, and sizes that are only claimed.

Plain data alone does not make a file harmless. torch.load verifies no checksum, unpacks members to
any size, and a few bytes of pickle can name a key that takes ages to hash or a memo of gigabytes.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from typing import cast

import torch

_ZIP_START, _ZIP_END = b'PK\x03\x04', b'PK\x05\x06'
_ZIP64_LOCATOR = b'PK\x06\x07'
_END_SIZE, _LOCATOR_SIZE, _ZIP64_END_SIZE = 22, 20, 56
_PROTOCOL = 2  # of the pickles in torch files
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys
_MAX_TUPLE = 1000  # values in a tuple, those of the tuples in it included
_EXTRA_BYTES = 2**26  # small tensors may be expanded ones


class BrokenFile(ValueError):
    """The file is cut short, damaged or no torch file; the text says what is wrong."""


def read_torch_bytes(data: bytes) -> object:
    """What torch.save wrote as `data`, on the CPU: tensors, numbers, strings, plain containers.

    BrokenFile for damage; pickle.UnpicklingError for content that is refused: objects of other
    kinds, keys that would take ages, tensors that claim far more than the file holds. Damage in
    the numbers is noticed in ZIP files (torch 1.6 and later); older files carry no checksums.
    """
    if data[:4] == _ZIP_START:
        _check_archive(data)
    else:
        stream = io.BytesIO(data)
        for _ in range(_LEGACY_PICKLES):
            check_pickle(stream, protocol=_PROTOCOL)
    content = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    check_tensors(content)
    return content


def _check_archive(data: bytes) -> None:
    end = data[-_END_SIZE:]
    if end[:4] != _ZIP_END or end[-2:] != b'\0\0':
        raise BrokenFile('it is cut short')
    # Two readers look at the file, this one and torch's; they must see the same directory.
    locator = data[-_END_SIZE - _LOCATOR_SIZE : -_END_SIZE]
    if locator[:4] == _ZIP64_LOCATOR:
        (place,) = struct.unpack('<Q', locator[8:16])
        if place != len(data) - _END_SIZE - _LOCATOR_SIZE - _ZIP64_END_SIZE:
            raise BrokenFile('its directory is damaged')
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise BrokenFile('its parts are compressed, which torch.save never does')
            if sum(m.file_size for m in members) > len(data):
                raise BrokenFile('its parts overlap')
            if (name := archive.testzip()) is not None:
                raise BrokenFile(f'checksum of {name[:80]!r}')
            for member in members:
                if member.filename.lower().endswith('.pkl'):
                    check_pickle(io.BytesIO(archive.read(member)), protocol=_PROTOCOL)
    except BrokenFile:
        raise
    except Exception as error:  # what zipfile raises for flipped bits is not one kind
        raise BrokenFile(f'its directory is damaged: {error}') from error


def check_pickle(stream: io.BytesIO, *, protocol: int | None = None) -> None:
    """Reads one pickle from `stream` without building anything, up to its end.

    protocol: the only one that is taken; None takes all.

    pickle.UnpicklingError for tuples that hold each other so often that hashing one would not
    end, and for memo places far beyond the file; BrokenFile when it is no whole pickle.
    """
    stack: list[int | None] = []  # the number of values in each object; None is a mark
    memo: dict[int, int | None] = {}
    try:
        for op, arg, position in pickletools.genops(stream):
            if op.name == 'PROTO' and protocol not in (None, arg):
                raise BrokenFile(f'pickle protocol {arg}')
            if op.name == 'MARK':
                stack.append(None)
            elif op.name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
                place = len(memo) if arg is None else arg
                if not 0 <= place <= (position or 0):
                    raise pickle.UnpicklingError('it asks for more memory than it can need')
                memo[place] = stack[-1]
            elif op.name in ('GET', 'BINGET', 'LONG_BINGET'):
                stack.append(memo[int(arg or 0)])
            else:
                _apply(op, stack)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # random bytes make the reader fail in any way
        raise BrokenFile(f'it holds no whole pickle ({str(error)[:80]})') from error


def _apply(op: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """Takes the operands of `op` off the stack and puts the sizes of its results there."""
    before = op.stack_before
    taken: list[int | None] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    size = 1
    if op.name.startswith('TUPLE') or op.name in (
        'FROZENSET',
        'DUP',
        'REDUCE',
        'BUILD',
        'NEWOBJ',
        'NEWOBJ_EX',
        'OBJ',
        'INST',
    ):
        size += sum(cast(list[int], taken))  # of lists, sets and dicts no key can be made
    if size > _MAX_TUPLE and op.name.startswith(('TUPLE', 'FROZENSET')):
        raise pickle.UnpicklingError('it holds tuples of too many values')
    stack.extend([size] * len(op.stack_after))


def check_tensors(content: object) -> None:
    """pickle.UnpicklingError when the tensors in nested containers are not what they seem.

    Only dense tensors with data are taken, and all together may be little more than the memory
    behind them (an expanded tensor of a few bytes can claim any size).
    """
    claimed, held, seen, todo = 0, {}, set(), [content]
    while todo:
        value = todo.pop()
        if not isinstance(value, (torch.Tensor, dict, list, tuple, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != 'cpu' or value.is_nested:
                raise pickle.UnpicklingError('it holds tensors that are not dense')
            storage = value.untyped_storage()
            claimed += value.numel() * value.element_size()
            held[storage.data_ptr()] = storage.nbytes()
        else:
            todo.extend(value.values() if isinstance(value, dict) else value)
    if claimed > 4 * sum(held.values()) + _EXTRA_BYTES:
        raise pickle.UnpicklingError('its tensors claim far more numbers than it holds')
