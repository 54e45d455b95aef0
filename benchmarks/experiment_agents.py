"""Train the agents that come with the package, and write them where the package finds them.

python -m benchmarks.experiment_agents                     # all, about seven minutes of one core
python -m benchmarks.experiment_agents t_maze --seeds 0
"""

from __future__ import annotations

import argparse
import time

import torch

from tdhook_rl.experiments import RECIPES, SEEDS, make
from tdhook_rl.experiments.checkpoints import FOLDER

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="which agents; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names or RECIPES:
        for seed in options.seeds:
            start = time.process_time()
            make(name, seed, FOLDER, lambda what, done, of: print(f"\r{done}/{of}  {what}", end="", flush=True))
            print(f"\r{name} {seed}: {time.process_time() - start:.0f} s of CPU time")
