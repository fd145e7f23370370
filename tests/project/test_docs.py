"""Commands in the documentation: every script exists and knows the flags it is shown with."""

import re
import shlex

import pytest
from conftest import ROOT, load_script

PAGES = [
    ROOT / 'README.md',
    *sorted((ROOT / 'docs').glob('*.md')),
    *sorted((ROOT / 'pretrained_models').rglob('*.md')),
]
COMMAND = re.compile(r'python ((?:scripts|benchmarks|MIA|classification)/[\w-]+\.py)(.*)')


def commands():
    for page in PAGES:
        text = re.sub(r'\\\n\s*', ' ', page.read_text(encoding='utf-8'))
        for script, rest in COMMAND.findall(text):
            yield pytest.param(script, rest.split('`')[0], id=f'{page.stem}: {script}{rest[:30]}')


@pytest.mark.parametrize(('script', 'rest'), list(commands()))
def test_documented_command(script, rest):
    folder, name = script.removesuffix('.py').split('/')
    parser = load_script(name, folder).build_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    used = {word.split('=')[0] for word in shlex.split(rest, comments=True) if word.startswith('-')}
    assert used <= known, f'{script} does not know {sorted(used - known)}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)#]+)\)', text):
        if not target.startswith('http'):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def spellings():
    """(house, published) -> scripts, of flags that have both."""
    found = {}
    for folder in ('scripts', 'MIA', 'classification'):
        for file in sorted((ROOT / folder).glob('*.py')):
            if 'def build_parser(' not in file.read_text(encoding='utf-8'):
                continue
            for action in load_script(file.stem, folder).build_parser()._actions:
                names = [s[2:].replace('-', '_') for s in action.option_strings if s[:2] == '--']
                names.sort(key='moco_weights'.__ne__)  # published, and listed second
                for name in dict.fromkeys(names):
                    if name != names[0] and not name.startswith('no_'):
                        found.setdefault((name, names[0]), []).append(file.stem)
    return found


def table_of_spellings():
    return [
        f'| `--{house}` | `--{published}` | {", ".join(scripts)} |'
        for (house, published), scripts in sorted(spellings().items())
    ]


def test_the_table_of_spellings_is_that_of_the_parsers():
    page = (ROOT / 'docs' / 'options.md').read_text(encoding='utf-8').splitlines()
    start = page.index('|---|---|---|') + 1
    assert page[start : page.index('', start)] == table_of_spellings()
