"""Two classes, trained on reconstructions: give their folder with --baseline.

The published command of this name; all flags are those of main.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.main import main
from utils.cli import run

DEFAULTS = ['-config', 'eyepacs_2cls.yaml']

if __name__ == '__main__':
    run(lambda: main([*DEFAULTS, *sys.argv[1:]]))
