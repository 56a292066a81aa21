"""A driver in a process of its own, which tests may kill: python -m tests.sweep.drive SWEEP JOBS"""

import sys
from pathlib import Path

from engram.sweep.driver import run_all
from engram.sweep.grid import expand, unique
from engram.sweep.pool import Pool
from engram.sweep.spec import load_sweep

FAKE = (sys.executable, str(Path(__file__).with_name("fake_train.py")))

if __name__ == "__main__":
    sweep = load_sweep(sys.argv[1])
    runs = unique(expand(sweep))
    sys.exit(run_all(runs, Pool(sweep.pool, sweep.out), jobs=int(sys.argv[2]), command=FAKE))
