"""Options described once: flags, entries, records, resume rule, checks; errors that name flags."""

import argparse
import dataclasses
import json
import logging
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import cli
from utils.errors import PrivacyError, UserError
from utils.kinds import (
    auto_or,
    boolean,
    choice,
    list_of,
    named,
    nonnegative_float,
    positive_float,
    positive_int,
    text,
)
from utils.options import add_flags, build, check, entries, free, option, read_entries


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float | str = option(0.1, auto_or(positive_float), 'rate')
    places: tuple = option((), list_of(named({'eye': 'eyes', 'visit': 'visits'}), 'places'))


@dataclasses.dataclass(frozen=True)
class Outer:
    k: int = option(5, positive_int, 'people', group='groups', flag='same_k')
    mode: str = option('a', choice('a', 'b'))
    loud: bool = option(False, boolean)
    most: int | None = option(None, positive_int, free=True)
    inner: Inner = Inner()


def parsed(*argv):
    p = cli.parser('test')
    add_flags(p, Outer)
    return build(Outer, vars(p.parse_args(argv)))


def test_flags_make_settings():
    assert parsed() == Outer()
    wanted = Outer(7, 'b', True, 3, Inner('auto', ('visits', 'eyes')))
    argv = ['--same_k=7', '--mode=b', '--loud', '--most=3', '--lr=auto', '--places', 'visit', 'eye']
    assert parsed(*argv) == wanted
    assert parsed('--k=7') == parsed('--same_k=7') == Outer(7)
    for bad in ('--k=0', '--mode=c', '--lr=nan', '--places=eyes', '--most=1.5'):
        with pytest.raises(SystemExit):
            parsed(bad)


def test_records_hold_published_names_and_lead_back():
    settings = Outer(7, inner=Inner(2.0, ('eyes',)))
    record = entries(settings, recorded=True)
    assert record['same_k'] == 7 and record['places'] == ['eye'] and record['lr'] == 2.0
    assert build(Outer, json.loads(json.dumps(record))) == settings
    assert free(Outer) == ('most',)


def test_entries_of_a_file():
    given = {'k': 2, 'lr': '1e-3', 'places': ['eyes'], 'most': None}
    assert read_entries(Outer, given, 'c.yaml') == Outer(2, inner=Inner(1e-3, ('eyes',)))
    wrong = {'k': '2', 'mod': 'a', 'loud': 'maybe', 'lr': -1, 'most': True}
    with pytest.raises(UserError) as error:
        read_entries(Outer, wrong, 'c.yaml')
    lines = str(error.value).splitlines()
    assert lines[0] == 'c.yaml:' and 'unknown: mod (did you mean mode?)' in lines[1]
    assert [line.split(':')[0].strip() for line in lines[2:]] == ['k', 'loud', 'most', 'lr']


def test_required_entries():
    @dataclasses.dataclass(frozen=True)
    class Needy:
        file: str = option(kind=text)

    with pytest.raises(UserError, match='missing: file'):
        read_entries(Needy, {}, 'c.yaml')


def test_values_made_in_python_are_checked():
    check(Outer())
    with pytest.raises(UserError, match='`k`: want a whole number above 0, not 0; `mode`: want'):
        check(Outer(k=0, mode='z'))


def test_infinite_and_huge_numbers_are_none():
    for word in ('inf', 'nan', '1e39', '-1', 'x'):
        with pytest.raises(argparse.ArgumentTypeError, match=f'{word}.* is not a number'):
            nonnegative_float(word)


def test_errors_of_libraries_name_the_flags_of_the_script():
    def build_parser():
        p = cli.parser('test')
        add_flags(p, Outer)
        return p

    @cli.names_flags(build_parser)
    def main(argv):
        raise UserError('`k` 9: lower `k` or `most`, not `unknown`')

    with pytest.raises(UserError, match='^--same_k 9: lower --same_k or --most, not `unknown`$'):
        main([])


@pytest.mark.parametrize(
    ('raised', 'code'),
    [
        ("UserError('no')", 2),
        ("PrivacyError('no')", 3),
        ('KeyboardInterrupt', 130),
        ("OSError(28, 'full', 'f')", 1),
        ("OSError(2, 'none', 'f')", 2),
    ],
)
def test_exit_codes(raised, code, capsys):
    def main():
        raise eval(raised, {'UserError': UserError, 'PrivacyError': PrivacyError})

    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
    finally:
        logging.captureWarnings(False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert stopped.value.code == code and capsys.readouterr().err.count('\n') == 1


def test_a_bad_flag_is_one_line(capsys):
    p = cli.parser('A script.')
    p.add_argument('--k', type=cli.positive_int)
    for argv, start in ((['--k=0'], '--k: '), (['--l=1'], 'unrecognized arguments: --l=1')):
        with pytest.raises(SystemExit) as stopped:
            p.parse_args(argv)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count('\n') == 1
        assert said.startswith(f'error: {start}') and '--help' in said


def test_kinds_need_no_heavy_imports():
    """The types of flags are imported by everything."""
    code = 'import sys, utils.kinds, utils.options; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
