"""Uniform random actions on the mazes, fresh at every step and held for 20: what every score is to be compared with.

python assets/results/uniform.py
python assets/results/plot_results.py --add runs/*__uniform__*
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import drac_amort
import drac_runner as runner
import envs

ACTION_DIM = 2


def make_policy(hold_steps: float) -> envs.Policy:
    """The actor's own noise, which is uniform, stretched to [-1, 1]: its clocks without its network."""
    actor = drac_amort.Actor(drac_amort.Args(z_dim=ACTION_DIM), 4, ACTION_DIM)
    noise = drac_amort.HeldLatents(actor, hold_steps, torch.Generator().manual_seed(1))
    return lambda obs, starts: 2 * noise(starts)[0].numpy() - 1


def main() -> None:
    for name in ("Simple", "Medium", "Hard"):
        make = partial(drac_amort.make_env, f"MultiGoalPointMaze-{name}-v0")
        summary = {"global_step": 0} | envs.evaluate_policy(make_policy(1.0), make, 100, seed=1)
        run = Path("runs", f"MultiGoalPointMaze-{name}-v0__uniform__1__{time.strftime('%Y%m%d-%H%M%S')}")
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": 1}))
        (run / "evaluations.csv").write_text(
            "\n".join(",".join(map(str, line)) for line in (summary, summary.values())) + "\n"
        )
        for prefix, steps in (("final", 1.0), ("final_held", runner.HELD_STEPS)):
            trials = envs.final_trials(make_policy(steps), make, 100, seed=1)
            summary |= {f"{prefix}_{name}": value for name, value in trials.items()}
        (run / "summary.json").write_text(json.dumps(summary, indent=2))
        print(run, json.dumps(summary))


if __name__ == "__main__":
    main()
