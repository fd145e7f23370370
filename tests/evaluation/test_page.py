"""The page of an evaluation in a real browser: every picture is there, and it fits its window."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from test_board import ATTACK, PROBE, row

from evaluation.report import write_report
from utils.images import grid, save_png

BROWSER = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
)
ASK = """<script>
addEventListener('load', () => {
  const missing = [...document.images].filter(i => !i.naturalWidth).length;
  const wide = Math.max(0, document.documentElement.scrollWidth - innerWidth);
  document.title = `missing ${missing} of ${document.images.length}, wider by ${wide}`;
});
</script>"""


@pytest.mark.skipif(not BROWSER, reason='no Chromium here')
@pytest.mark.parametrize('width', [500, 1300])
def test_the_page_in_a_browser(tmp_path, width):
    rows = [row(0.2), row(0.01, k=12)]
    for r in rows:
        r.scores['identity'] = np.array([0.9, 0.6, 0.4]), np.array([0.5, 0.3, 0.1])
        r.results['probe'] |= {'value': 0.9}
        save_png(grid(torch.zeros(4, 3, 64, 64), 4), tmp_path / f'methods/{r.name}/examples.png')
    facts = {'name': 'test', 'n_members': 9, 'n_others': 9, 'n_again': 0, 'versions': {}, 'seed': 0}
    write_report(tmp_path, rows, [PROBE, ATTACK], facts=facts, config={})
    page = tmp_path / 'results.html'
    page.write_text(page.read_text().replace('</body>', f'{ASK}</body>'))
    shown = subprocess.run(
        [
            BROWSER,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--user-data-dir={tmp_path / "profile"}',
            f'--window-size={width},900',
            '--virtual-time-budget=5000',
            '--dump-dom',
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    # Two examples, the trade-off and the ROC curve.
    assert shown.split('<title>')[1].split('</title>')[0] == 'missing 0 of 4, wider by 0'
