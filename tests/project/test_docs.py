"""The documentation: scripts know the flags shown, paths exist, examples are clean."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, load_script

PAGES = [
    *(ROOT / f'{name}.md' for name in ('README', 'CHANGELOG', 'CONTRIBUTING', 'SECURITY')),
    *sorted((ROOT / 'docs').glob('*.md')),
    *sorted((ROOT / 'pretrained_models').rglob('*.md')),
]
# Files that readers make or bring.
OF_USERS = {
    'evaluation/attacks/brightness.py',
    'pretrained_models/moco_v2_800ep_pretrain.pt',
    'pretrained_models/restyle_aptos.pt',
    'pretrained_models/vgg19-dcbb9e9d.pth',
}
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


def anchors(page):
    """What links to the headings of a page end in."""
    headings = re.findall(r'^#+ (.*)', page.read_text(encoding='utf-8'), re.M)
    return {re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    for target, anchor in re.findall(r'\]\(([^)#\s]*)(?:#([^)\s]*))?\)', text):
        if not target.startswith('http'):
            file = page.parent / target if target else page
            assert file.exists(), f'{page.name}: {target}'
            assert not anchor or anchor in anchors(file), f'{page.name}: {target}#{anchor}'


def files():
    """What git knows of, or what is there where there is no git."""
    told = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if told.returncode == 0:
        return {ROOT / name for name in told.stdout.splitlines()}
    return {f for f in ROOT.rglob('*') if f.is_file() and not f.is_relative_to(ROOT / '.venv')}


def test_paths_in_the_text_exist():
    known = files()
    known |= {folder for f in known for folder in f.parents}
    tops = {f.relative_to(ROOT).parts[0] for f in known if ROOT in f.parents}
    shape = re.compile(rf'`((?:{"|".join(map(re.escape, sorted(tops)))})(?:/[\w.-]+)+/?)`')
    missing = [
        f'{page.name}: {path}'
        for page in PAGES
        for path in shape.findall(page.read_text(encoding='utf-8'))
        if ROOT / path not in known and path not in OF_USERS
    ]
    assert not missing


def test_examples_keep_the_rules_of_the_house():
    """A reader who copies one passes `make lint`."""
    for page, start in (('CONTRIBUTING.md', 'class ToyEncoder'), ('docs/evaluation.md', '@attack')):
        blocks = re.findall(r'```python\n(.*?)```', (ROOT / page).read_text('utf-8'), re.S)
        (code,) = (block for block in blocks if start in block)
        for rule in (['check'], ['format', '--check']):
            ruff = [sys.executable, '-m', 'ruff', *rule, '--stdin-filename=models/toy.py', '-']
            done = subprocess.run(ruff, cwd=ROOT, input=code, capture_output=True, text=True)
            assert done.returncode == 0, f'{page}: {done.stdout}{done.stderr}'


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
