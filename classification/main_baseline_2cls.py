"""Two classes, trained on as many photographs as there are groups (--baseline real-same-n).

The published command of this name; all flags are those of main.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.main import main
from utils.cli import run

DEFAULTS = ['-config', 'eyepacs_2cls.yaml', '--baseline', 'real-same-n']

if __name__ == '__main__':
    run(lambda: main([*DEFAULTS, *sys.argv[1:]]))
