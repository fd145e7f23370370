"""The whole comparison on a few tiny phantoms, and its complaints."""
import json

import pytest
import yaml
from conftest import load_script
from release_fixture import save_networks

from utils.errors import UserError

evaluate = load_script('evaluate')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A configuration file of a run of seconds."""
    folder = tmp_path_factory.mktemp('evaluation')
    save_networks(folder)
    grader = yaml.safe_load((evaluate.ROOT / 'classification/configs/small.yaml').read_text())
    grader |= {'image_size': 32, 'small_stem': True, 'epochs': 1, 'batch_size': 8}
    (folder / 'grader.yaml').write_text(yaml.safe_dump(grader))
    entries = {'name': 'test', 'phantoms': {'n_patients': 40, 'size': 32, 'visits': 2, 'seed': 1},
               'checkpoint': str(folder / 'psp.pt'), 'content_weights': str(folder / 'content.pt'),
               'num_steps': 1, 'k': [2, 3], 'methods': list(evaluate.METHODS),
               'grader': str(folder / 'grader.yaml'), 'seeds': [0]}
    (folder / 'config.yaml').write_text(yaml.safe_dump(entries))
    return folder / 'config.yaml'


def test_the_comparison(config, tmp_path, capsys):
    flags = [f'--config={config}', f'--out_dir={tmp_path / "out"}', '--device=cpu']
    assert evaluate.main(flags) == 0
    found = json.loads((tmp_path / 'out' / 'results.json').read_text())
    names = [r['name'] for r in found['rows']]
    assert sorted(names) == sorted(['real', 'real_same_n', 'inverted', 'unconditional'] + [
        f'{m}_k{k}' for m in evaluate.GROUPED for k in (2, 3)])
    rows = {r['name']: r for r in found['rows']}
    assert rows['k_salsa_k2']['n'] > rows['k_salsa_k3']['n']
    assert rows['real_same_n']['n'] == rows['k_salsa_k2']['n']
    for row in rows.values():
        assert set(row['attacks']) == set(evaluate.ATTACKS)
        assert 0 <= row['utility']['summary']['auc_referable']['mean'] <= 1
    # The photographs themselves must be found by the attacks, or the attacks do not work.
    assert all(a['auc']['value'] > 0.95 for a in rows['real']['attacks'].values())
    assert rows['k_salsa_k2']['reidentification']['n_probes'] > 0
    assert rows['unconditional']['reidentification'] is None
    page = (tmp_path / 'out' / 'results.html').read_text()
    for name in names:
        assert f'methods/{name}/examples.png' in page
        assert (tmp_path / 'out' / 'methods' / name / 'examples.png').stat().st_size > 0
    assert 'http' not in page.replace('http-equiv', '')
    table = (tmp_path / 'out' / 'results.md').read_bytes()
    capsys.readouterr()
    assert evaluate.main(flags) == 0    # everything is cached, and says the same
    assert (tmp_path / 'out' / 'results.md').read_bytes() == table


@pytest.mark.parametrize('change, message', [
    ({'methods': ['k_salsa', 'magic']}, 'unknown methods.*magic'),
    ({'colour': 1}, "unknown.*colour"),
    ({'table': 'x.csv'}, 'either phantoms or table'),
    ({'k': None}, 'k: '),
    ({'methods': ['unconditional', 'k_salsa']}, 'list real'),
    ({'checkpoint': 'nowhere.pt'}, 'nowhere.pt'),
])
def test_bad_configuration(config, tmp_path, change, message):
    entries = yaml.safe_load(config.read_text()) | change
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError, match=message):
        evaluate.main([f'--config={tmp_path / "config.yaml"}', f'--out_dir={tmp_path / "out"}',
                       '--device=cpu'])
    assert not (tmp_path / 'out').exists()
