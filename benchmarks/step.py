"""Where one optimisation step of this project spends its time.

    python benchmarks/step.py --size=256 --precision=bf16 --markdown

Networks of published sizes with random weights; seconds for one batch of groups, the best of
--repeats, operations as counted by torch.utils.flop_counter, and both related by the matrix rate
measured in the same run. Gradients are those with respect to the part's input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from anonymization.optimize import (
    ACTIVATIONS,
    PRECISIONS,
    Group,
    GroupOptimizer,
    OptimizeConfig,
    matmul_precision,
)
from benchmarks.anonymise import add_group_sizes, one_step, operations, photographs, random_networks
from benchmarks.layers import best_ms
from benchmarks.machine import describe, matrix_rate, print_rows
from criteria.content import content_loss
from utils.cli import parser_of, positive_int, resolve_device, run
from utils.images import from_uint8


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    add_group_sizes(p)
    p.add_argument(
        '--groups', type=positive_int, default=1, metavar='INT', help='groups optimised together'
    )
    p.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of the networks')
    p.add_argument('--repeats', type=positive_int, default=3, metavar='INT', help='timed calls')
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--markdown', action='store_true', help='print a Markdown table')
    return p


def parts_of_a_step(
    engine: GroupOptimizer, groups: Sequence[Group]
) -> dict[str, Callable[[], None]]:
    """{name: function that does this part of a step, with its gradient}."""
    targets = engine.targets(groups)
    term, wanted = engine.style, targets.style
    assert term is not None and wanted is not None
    start = torch.stack([g.ws.to(engine.device).mean(0) for g in groups])
    with torch.no_grad():
        picture = engine.psp.pool(engine.synthesis(start))

    def gradient(function: Callable[[Tensor], Tensor], x: Float[Tensor, '...']) -> None:
        leaf = x.clone().requires_grad_(True)
        torch.autograd.grad(function(leaf).sum(), leaf)

    def content(y: Float[Tensor, 'G 3 S S']) -> Float[Tensor, ' G']:
        return content_loss(engine.content_net.features(y), targets.content)

    def style(y: Float[Tensor, 'G 3 S S']) -> Float[Tensor, ' G']:
        return term.loss(term.maps(y), wanted)

    return {
        'generator': lambda: gradient(engine.synthesis, start),
        'content loss': lambda: gradient(content, picture),
        'local style loss': lambda: gradient(style, picture),
        'whole step': lambda: one_step(engine, start, targets),
    }


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device = resolve_device(opts.device)
    torch.backends.cudnn.benchmark = True
    psp, content, style = random_networks(opts.size, 0, opts.encoder_size, opts.channels)
    photos = photographs(opts.k * opts.groups, 2, opts.encoder_size).split(opts.k)
    engine = GroupOptimizer(
        psp, content, style, config=OptimizeConfig(), device=device, precision=opts.precision
    )
    rows = [['part, with gradient', 'GFLOP', 's', 'floor, s', 'times the floor']]
    with matmul_precision(opts.precision):
        rate = matrix_rate(device, ACTIVATIONS[opts.precision])
        # Seen as content features, so that a photograph stands for its reconstruction.
        with torch.no_grad():
            features = [content.features(from_uint8(p.to(device))) for p in photos]
        latents = psp.latent_avg + 0.2 * torch.randn(opts.k, *psp.latent_avg.shape, device=device)
        groups = [Group(latents, p, f) for p, f in zip(photos, features)]
        for name, function in parts_of_a_step(engine, groups).items():
            work, took = operations(function), best_ms(function, device, opts.repeats) / 1000
            floor = work / rate
            rows.append(
                [name, f'{work / 1e9:.0f}', f'{took:.3f}', f'{floor:.3f}', f'{took / floor:.1f}']
            )
    print(f'{describe(device)}; {opts.precision} matrix rate {rate / 1e9:.0f} GFLOP/s')
    print_rows(rows, markdown=opts.markdown)
    return 0


if __name__ == '__main__':
    run(main)
