"""Two classes, trained on as many photographs as there are groups (--baseline real-same-n).

The published command of this name; all flags are those of main.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.two_classes import two_classes
from utils.cli import run

if __name__ == '__main__':
    run(lambda: two_classes(['--baseline', 'real-same-n'], sys.argv[1:]))
