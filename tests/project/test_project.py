"""Rules of the house: who imports whom, what every script offers, what the files may say."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, slow_tests

ALLOWED = {
    'configs': set(),
    'utils': set(),
    'models': {'utils'},
    'datasets': {'utils'},
    'criteria': {'models', 'utils'},
    'training': {'models', 'criteria', 'datasets', 'utils'},
    'anonymization': {'models', 'criteria', 'datasets', 'utils'},
    'evaluation': {'models', 'criteria', 'datasets', 'anonymization', 'classification', 'utils'},
    'stages': {'models', 'datasets', 'anonymization', 'evaluation', 'utils'},
    'scripts': {
        'configs',
        'models',
        'criteria',
        'datasets',
        'training',
        'anonymization',
        'evaluation',
        'stages',
        'classification',
        'MIA',
        'utils',
    },
    'classification': {'configs', 'models', 'datasets', 'training', 'evaluation', 'utils'},
    'MIA': {'configs', 'models', 'datasets', 'training', 'evaluation', 'utils'},
}
# Folders whose code is a library: it never prints, exits or picks a device.
LIBRARY = ('models', 'criteria', 'datasets', 'training', 'anonymization', 'evaluation', 'stages')


def sources(*folders):
    return [f for folder in folders for f in sorted((ROOT / folder).rglob('*.py'))]


def test_import_rules():
    bad = []
    for f in sources(*ALLOWED):
        top = f.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and node.level == 0
                else []
            )
            bad += [
                f'{f}:{node.lineno} -> {n}'
                for n in names
                if n.split('.')[0] in ALLOWED.keys() - {top} - ALLOWED[top]
            ]
    assert not bad, '\n'.join(bad)


def test_library_code_neither_prints_nor_exits():
    bad = []
    for f in sources(*LIBRARY):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                if text in ('print', 'exit', 'quit', 'sys.exit', 'input') or text.endswith('.cuda'):
                    bad.append(f'{f}:{node.lineno} {text}')
    assert not bad, '\n'.join(bad)


def test_torch_files_are_only_loaded_as_plain_data():
    bad = []
    for f in sources(*ALLOWED):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
                safe = any(
                    k.arg == 'weights_only' and ast.unparse(k.value) == 'True'
                    for k in node.keywords
                )
                if not safe:
                    bad.append(f'{f}:{node.lineno}')
    assert not bad, '\n'.join(bad)


def test_pictures_are_only_opened_in_one_place():
    """utils.images.open_image knows which formats are safe."""
    bad = [
        f'{f}:{node.lineno}'
        for f in sources(*ALLOWED, 'benchmarks')
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8')))
        if isinstance(node, ast.Call)
        and f.name != 'images.py'
        and re.fullmatch(
            r'(PIL\.)?Image\.open|imread|.*\.imread|read_image', ast.unparse(node.func)
        )
    ]
    assert not bad, '\n'.join(bad)


def test_scripts_explain_themselves():
    scripts = [f for f in sources('scripts') if f.name != '__init__.py']
    assert scripts
    for f in scripts:
        tree = ast.parse(f.read_text(encoding='utf-8'))
        assert ast.get_docstring(tree), f'{f.name} has no docstring'
        mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == 'main']
        assert mains and mains[0].args.args[0].arg == 'argv', f'{f.name} has no main(argv)'


def test_dependencies_agree():
    def names(text):
        return re.findall(r'^\s*"?([A-Za-z][\w.-]*)>=', text, re.M)

    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    listed = project[project.index('dependencies = [') : project.index('[tool.ruff]')]
    requirements = (ROOT / 'environment' / 'requirements.txt').read_text(encoding='utf-8')
    assert set(names(listed)) == set(names(requirements))
    assert len(names(requirements)) == len(set(names(requirements)))
    reasons = [line for line in listed.splitlines() if re.match(r'\s+"', line)]
    assert all('#' in line for line in reasons)


def test_nothing_is_installed_over_other_packages(tmp_path):
    """Refused with one sentence, and a library that is there keeps every byte."""
    theirs = tmp_path / 'site' / 'datasets' / '__init__.py'
    theirs.parent.mkdir(parents=True)
    theirs.write_text('a = 1\n')
    for how in ([], ['--editable']):
        done = subprocess.run(
            [
                sys.executable,
                '-m',
                'pip',
                'install',
                '--no-deps',
                '--no-index',
                '--target',
                str(tmp_path / 'site'),
                *how,
                str(ROOT),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode and 'runs from its checkout' in done.stdout + done.stderr
    assert [p for p in (tmp_path / 'site').rglob('*') if p.is_file()] == [theirs]
    assert theirs.read_text() == 'a = 1\n'


@pytest.mark.parametrize('pattern', [r'/home/\w', r'/hub_data', r'/root/', r'/tmp/\w'])
def test_no_machine_paths(pattern):
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.split() if tracked.returncode == 0 else []
    found = [
        f
        for f in files
        if f.endswith(('.py', '.md', '.yaml', '.toml', '.txt', '.json'))
        and f != 'tests/project/test_project.py'
        and re.search(pattern, (ROOT / f).read_text(encoding='utf-8'))
    ]
    assert not found


def test_files_and_functions_stay_short():
    """At most 450 lines a file and, outside the tests, 60 a function, decorators counted."""
    bad = []
    for f in sources(*ALLOWED, 'benchmarks', 'environment', 'tests'):
        name, text = f.relative_to(ROOT).as_posix(), f.read_text(encoding='utf-8')
        if (n := len(text.splitlines())) > 450:
            bad.append(f'{name}: {n} lines')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                n = node.end_lineno - first + 1
                if n > 60 and not name.startswith('tests/'):
                    bad.append(f'{name}:{node.lineno} {node.name}: {n} lines')
    assert not bad, '\n'.join(bad)


def test_slow_tests_exist():
    """Every line of tests/slow.txt names a folder, a file or a test of one."""
    for line in slow_tests():
        path, _, name = line.partition('::')
        assert (ROOT / path).exists(), line
        assert not name or f'def {name}(' in (ROOT / path).read_text(encoding='utf-8'), line


# A message may show another program's command, and help the flags that it is about.
COMMANDS = re.compile(r'(\.py|gdcmconv|pip install)\b[^;]*?--[a-z]')
HEADINGS = {'required, except with --resume RUN'}


def strings(node):
    """All texts below a node but docstrings and the descriptions of options."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'option':
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from strings(child)


def test_messages_of_the_library_name_parameters():
    """Scripts put their flags there (utils.cli.names_flags); in Python there are none."""
    found = [
        f'{file.relative_to(ROOT)}:{text.lineno}: {text.value}'
        for file in sources(*LIBRARY)
        for text in strings(ast.parse(file.read_text(encoding='utf-8')))
        if re.search(r'(?<![\w-])--[a-z]', text.value)
        and not re.fullmatch(r'--[\w-]+(=\S*)?', text.value)  # an argument of a command
        and not COMMANDS.search(text.value)
        and text.value not in HEADINGS
    ]
    assert found == []


def test_every_script_names_its_flags_in_errors():
    scripts = [
        f for f in sources('scripts', 'MIA', 'classification') if 'cli.run(' in f.read_text()
    ]
    assert len(scripts) > 20
    bare = [
        f.name
        for f in scripts
        if 'build_parser' in f.read_text() and 'names_flags(' not in f.read_text()
    ]
    assert bare == []
