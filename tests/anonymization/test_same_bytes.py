"""The release does not depend on how much is computed at a time, or by how many processes."""

import threading

import pytest
import torch
from conftest import load_script
from release_fixture import arguments, save_networks, save_photographs, tree_bytes
from two_processes import Together

from anonymization import optimisation
from anonymization.workers import deterministic_algorithms, each, one_thread

k_salsa = load_script('k-SALSA')


def run_main_job(argv):
    return k_salsa.main(argv)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """Inputs, and the run of one process with one thread: eight groups."""
    folder = tmp_path_factory.mktemp('one')
    save_networks(folder)
    save_photographs(folder / 'data', 17)
    assert k_salsa.main(command(folder, folder / 'run', group_batch=1)) == 0
    return folder


def command(folder, exp_dir, **options):
    return arguments(
        folder,
        folder / 'data',
        exp_dir,
        **{'same_k': 2, 'num_steps': 8, 'style_weight': 1e-4, **options},
    )


@pytest.mark.parametrize(
    ('threads', 'options'),
    [
        (1, {'group_batch': 8}),
        (2, {'group_batch': 2, 'test_batch_size': 17}),
        (3, {'group_batch': 4, 'test_batch_size': 3}),
    ],
)
def test_groups_and_threads(one, tmp_path, threads, options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert k_salsa.main(command(one, tmp_path / 'run', **options)) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(one / 'run/release')


def test_free_memory(one, tmp_path, monkeypatch):
    monkeypatch.setattr(optimisation, 'memory', lambda device: 1)
    with one_thread():
        torch.set_num_threads(2)
        assert k_salsa.main(command(one, tmp_path / 'run', test_workers=2)) == 0
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(one / 'run/release')


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU: the order of its sums is what is asked'
)
def test_deterministic_on_a_gpu(one, tmp_path):
    for name, options in (('a', {}), ('b', {'group_batch': 3, 'test_batch_size': 5})):
        asked = command(one, tmp_path / name, device='cuda', **options)
        assert k_salsa.main([*asked, '--deterministic']) == 0
    assert tree_bytes(tmp_path / 'a/release') == tree_bytes(tmp_path / 'b/release')


@pytest.mark.parametrize('n', [2, 3])
def test_processes(one, tmp_path, n):
    asked = command(one, tmp_path / 'run', group_batch=4)
    Together(n, tmp_path / 'log', run_main_job, asked, threads=n - 1).wait()
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(one / 'run/release')


def test_an_error_ends_all_units():
    begun = []
    all_begun = threading.Barrier(3)

    def work(item, check):
        begun.append(item)
        assert torch.get_num_threads() == 1
        if item < 3:
            all_begun.wait(60)
        if item == 1:
            raise OSError('disk full')
        while True:
            check()

    with pytest.raises(OSError, match='disk full'):
        each(work, range(100), 3)
    assert set(begun) <= {0, 1, 2, 3, 4}


def test_deterministic_algorithms_are_restored():
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        with deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
