"""Two classes, trained on k-SALSA pictures: main.py -config eyepacs_2cls.yaml.

The published command of this name; all flags are those of main.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.two_classes import two_classes
from utils.cli import run

if __name__ == '__main__':
    run(lambda: two_classes([], sys.argv[1:]))
