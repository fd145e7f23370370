"""What the pretended GPU notices: mixed devices, waits."""

import numpy as np
import torch
from pretended_device import PretendedGPU


def test_what_a_gpu_refuses_is_noticed(gpu: PretendedGPU) -> None:
    x, cpu = torch.ones(3, device='cuda', requires_grad=True), torch.ones(3)
    assert x.is_cuda and (x * 2).device.type == 'cuda' and not cpu.is_cuda
    (x * 2).sum().backward()
    assert x.grad.is_cuda and not gpu.faults and not gpu.n_waits
    x.detach() + torch.tensor(2.0)  # a number of the CPU
    assert not gpu.faults
    for mix in (
        lambda: x + cpu,
        lambda: torch.stack([x, cpu]),
        lambda: x.detach().numpy(),
        lambda: torch.randn(3, device='cuda', generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator(device='cuda')),
    ):
        mix()
        assert len(gpu.faults) == 1, gpu.report()
        gpu.clear()


def test_waits_are_noticed(gpu: PretendedGPU) -> None:
    x, cpu = torch.ones(3, device='cuda'), torch.ones(3)
    for wait in (
        lambda: float(x.sum()),
        x.tolist,
        x.cpu,
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: cpu.to('cuda'),
        lambda: cpu.to('cuda', non_blocking=True),
        lambda: torch.tensor([1.0], device='cuda'),
        lambda: x.copy_(cpu),
        lambda: x.new_tensor([2.0]),
        lambda: x[np.array([0, 1])],
    ):
        gpu.clear()
        wait()
        assert gpu.n_waits == 1 and not gpu.faults, gpu.report()
        assert 'test_pretence.py' in next(iter(gpu.waits))
    gpu.clear()
    cpu.pin_memory().to('cuda', non_blocking=True)
    assert not gpu.n_waits
