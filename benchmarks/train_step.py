"""Times generator training steps: images per second, seconds per kimg, and where the time goes.

    python benchmarks/train_step.py --size=256 --cfg=auto --precision=fp16 --breakdown

Random images stand in for photographs; they cost the same. The matrix rate of the machine is
measured in the same run, so that the fraction of it that the convolutions reach can be given.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from training.augment import PIPES
from training.stylegan2_config import PRESETS, make_config
from training.stylegan2_loop import Trainer
from utils.cli import fraction, parser, positive_int, power_of_two, resolve_device, run

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class RandomImages(torch.utils.data.Dataset):
    """`n` fixed uint8 images."""

    def __init__(self, n, size):
        self.images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], torch.zeros(0)


def build_parser():
    p = parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    p.add_argument('--size', type=power_of_two, default=256, metavar='PX', help='image size')
    p.add_argument('--cfg', choices=PRESETS, default='auto', help='configuration')
    p.add_argument('--batch', type=positive_int, metavar='INT', help='images per step')
    p.add_argument('--precision', choices=sorted(DTYPES), default='fp32',
                   help='of the four highest resolutions')
    p.add_argument('--p', type=fraction, default=0.3, metavar='FLOAT',
                   help='augmentation strength')
    p.add_argument('--steps', type=positive_int, default=16, metavar='INT',
                   help='timed steps; 16 hold every regularisation in its true share')
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--breakdown', action='store_true', help='print the costliest operations')
    return p


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


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def main(argv=None):
    opts = build_parser().parse_args(argv)
    device = resolve_device(opts.device)
    torch.backends.cudnn.benchmark = True
    config = make_config(opts.cfg, opts.size, 1, batch=opts.batch)
    trainer = Trainer(RandomImages(2 * config.batch, opts.size), config, device=device,
                      augment='fixed', augment_names=PIPES['bgc'], augment_p=opts.p,
                      precision=None if opts.precision == 'fp32' else opts.precision)
    for _ in range(3):
        trainer.step()
    with FlopCounterMode(display=False) as counter:
        for _ in range(config.d_reg_interval):
            trainer.step()
    work = counter.get_total_flops() / config.d_reg_interval
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(opts.steps):
        trainer.step()
    synchronize(device)
    took = (time.perf_counter() - begin) / opts.steps
    rate = matrix_rate(device, DTYPES[opts.precision])
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else (
        f'CPU, {torch.get_num_threads()} threads')
    print(f'{name}, torch {torch.__version__}')
    print(f'{opts.cfg} {opts.size} px, batch {config.batch}, {opts.precision}, p {opts.p}: '
          f'{config.batch / took:.1f} images/s, {1000 * took / config.batch:.1f} s/kimg')
    print(f'{work / 1e12:.3f} TFLOP a step, {work / took / 1e12:.2f} TFLOP/s, '
          f'{work / took / rate:.1%} of the measured {opts.precision} matrix rate '
          f'({rate / 1e12:.2f} TFLOP/s)')
    if device.type == 'cuda':
        print(f'peak memory {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB')
    if opts.breakdown:
        with torch.profiler.profile() as profiler:
            for _ in range(4):
                trainer.step()
            synchronize(device)
        key = 'self_cuda_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
        print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))
    return 0


if __name__ == '__main__':
    run(main)
