"""What the benchmarks measure about the machine itself."""
import time

import torch


def synchronize(device):
    """Waits for a GPU; nothing to wait for on the CPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def matrix_rate(device, dtype, n=4096):
    """Operations per second of an n x n matrix product, best of ten."""
    n = n if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float('inf')
    for _ in range(10):
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def describe(device):
    """One line: the device and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else (
        f'CPU, {torch.get_num_threads()} threads')
    return f'{name}, torch {torch.__version__}'
