"""Speed, measured side by side in one run: `python tests/benchmark.py` (a few minutes; leave the machine alone).

Every row of a table is measured in turns with all the others, so that a slow moment hits all of them, and shows the
median. Install stable-baselines3 beside the requirements to get the comparison of whole programs.

`python tests/benchmark.py MODEL`, with a model.pt of drac_amort.py, measures instead how noisy the estimators of the
diversity are at that policy, in states that it visits.
"""

import contextlib
import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import drac_amort  # noqa: E402
import envs  # noqa: E402

ENV_ID, OBS_DIM, ACTION_DIM, BATCH_SIZE = "Walker2d-v4", 17, 6, 256
ROUNDS, UPDATES_PER_ROUND, PROGRAM_ROUNDS, PROGRAM_STEPS, BURN_IN = 12, 12, 3, 1500, 500
VARIANTS = {
    "DrAmort, as shipped (M = 4)": {},
    "DrAmort, M = 8": {"num_action_samples": 8},
    "DrAmort, M = 17, disjoint pairs": {"num_action_samples": 17, "pairing": "disjoint"},
}


def mlp(*sizes, last=None):
    layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1], *([last] if last else []))


class PaperUpdate:
    """The paper's update of the amortized actor as one would first write it: 17 samples, 8 disjoint pairs."""

    num_samples, num_pairs = 17, 8

    def __init__(self):
        self.actor = mlp(OBS_DIM + 16, 256, 256, ACTION_DIM, last=nn.Tanh())
        self.q1, self.q2, self.target_q1, self.target_q2 = (mlp(OBS_DIM + ACTION_DIM, 256, 256, 1) for _ in range(4))
        self.raw_alpha = torch.zeros((), requires_grad=True)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.q_adam = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], lr=3e-4)
        self.alpha_adam = torch.optim.Adam([self.raw_alpha], lr=5e-3)

    def sample(self, obs):
        repeated = obs.unsqueeze(1).expand(-1, self.num_samples, -1)
        latents = torch.rand(len(obs), self.num_samples, 16)
        actions = self.actor(torch.cat([repeated, latents], dim=-1))  # (B, 17, action_dim)
        x, y = actions[:, : self.num_pairs], actions[:, self.num_pairs : 2 * self.num_pairs]
        return actions[:, -1], torch.log(torch.norm(x - y, dim=-1) + 1e-5).mean(dim=1)

    def update(self, batch):
        obs, actions, rewards, next_obs, terminations = batch
        alpha = torch.where(self.raw_alpha < 0, self.raw_alpha.exp(), 1 + self.raw_alpha)
        with torch.no_grad():
            next_actions, next_diversity = self.sample(next_obs)
            x = torch.cat([next_obs, next_actions], dim=1)
            next_q = torch.min(self.target_q1(x), self.target_q2(x)).squeeze(1) + alpha * next_diversity
            target = rewards + 0.99 * (1 - terminations) * next_q
        x = torch.cat([obs, actions], dim=1)
        q_loss = sum(nn.functional.mse_loss(q(x).squeeze(1), target) for q in (self.q1, self.q2))
        self.q_adam.zero_grad()
        q_loss.backward()
        self.q_adam.step()
        for q, target_q in ((self.q1, self.target_q1), (self.q2, self.target_q2)):
            for source, destination in zip(q.parameters(), target_q.parameters(), strict=True):
                destination.data.copy_(0.005 * source.data + 0.995 * destination.data)
        new_actions, diversity = self.sample(obs)
        x = torch.cat([obs, new_actions], dim=1)
        actor_loss = -(torch.min(self.q1(x), self.q2(x)).squeeze(1) + alpha.detach() * diversity).mean()
        self.actor_adam.zero_grad()
        actor_loss.backward()
        self.actor_adam.step()
        alpha_loss = alpha * (diversity.mean().detach() - np.log(0.5 * np.sqrt(ACTION_DIM)))
        self.alpha_adam.zero_grad()
        alpha_loss.backward()
        self.alpha_adam.step()


def medians(contenders, rounds=ROUNDS, repeats=UPDATES_PER_ROUND):
    """Median seconds per call of each function, called in turns."""
    times = {name: [] for name in contenders}
    for round_index in range(rounds + 1):
        for name, function in contenders.items():
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                if round_index > 0:  # the first round is burn-in
                    times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def count_flops(function):
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def drac_program(script):
    """Steps per second of the script as shipped, without evaluations: the median of its own log after burn-in."""
    flags = ["--env-id", ENV_ID, "--total-timesteps", str(PROGRAM_STEPS), "--evaluation-interval", "0"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        events = EventAccumulator(str(script.main([*flags, "--run-dir", folder])))
        events.Reload()
        speeds = [event.value for event in events.Scalars("charts/steps_per_second") if event.step > BURN_IN]
    return float(np.median(speeds))


def sb3_program():
    """Steps per second of Stable-Baselines3's SAC with its own defaults, timed in the same way."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def _init_callback(self):
            self.times = []

        def _on_step(self):
            if self.num_timesteps % 500 == 0:
                self.times.append(time.perf_counter())
            return True

    clock = Clock()
    SAC("MlpPolicy", drac_amort.make_env(ENV_ID), learning_starts=256, device="cpu").learn(PROGRAM_STEPS, clock)
    return float(np.median(500 / np.diff(clock.times)))


def estimator_noise(file, num_states=256, num_draws=100):
    """Standard deviation, over the noise of its actions, of the estimate of D(s) of one state."""
    model = torch.load(file, weights_only=True)
    obs = []

    def policy(observations):
        obs.extend(observations)
        return agent.act(observations)

    for name, flags in VARIANTS.items():
        args = drac_amort.Args(**{**model["config"], "num_action_samples": 4, "pairing": "all", **flags})
        env = envs.make_env(args.env_id)
        agent = drac_amort.DrAC(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
        agent.load_state_dict(model["weights"])
        torch.manual_seed(0)
        if not obs:
            envs.play_episodes(policy, [envs.make_env(args.env_id) for _ in range(20)], 20, seed=0)
            states = torch.as_tensor(np.random.default_rng(0).choice(np.stack(obs), num_states), dtype=torch.float32)
        with torch.no_grad():
            latents = [agent.actor.sample_latents(args.num_action_samples, num_states) for _ in range(num_draws)]
            estimates = torch.stack([agent.diversity(agent.actor(states, noise)) for noise in latents])
        print(f"  {name:34} mean {estimates.mean():.3f}, standard deviation {estimates.var(dim=0).mean().sqrt():.3f}")


def main():
    if len(sys.argv) > 1:
        return estimator_noise(sys.argv[1])
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {ENV_ID} sizes, batch {BATCH_SIZE}\n")
    print("Whole programs", flush=True)
    programs = {"DrAmort, as shipped": lambda: drac_program(drac_amort)}
    drac_program(drac_amort)
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    try:
        import stable_baselines3

        programs[f"Stable-Baselines3 {stable_baselines3.__version__} SAC"] = sb3_program
    except ImportError:
        print("(stable-baselines3 is not installed: no comparison)")
    speeds = {name: [] for name in programs}
    for _ in range(PROGRAM_ROUNDS):
        for name, program in programs.items():
            speeds[name].append(program())
    reference = np.median(list(speeds.values())[-1])
    for name, values in speeds.items():
        ratio = f"{np.median(values) / reference:8.2f} x" if len(speeds) > 1 else ""
        print(f"  {name:34}{np.median(values):9.1f} steps/s{ratio}")
    print(f"  peak memory of a DrAmort process of {PROGRAM_STEPS:,} steps: {peak_memory:,.0f} MiB")
    for name in ("Simple", "Medium", "Hard"):
        maze = envs.MultiGoalPointMaze(name.lower())
        maze.reset()
        rng = np.random.default_rng(0)
        seconds = medians({name: lambda maze=maze, rng=rng: maze.step(rng.uniform(-1, 1, 2))}, repeats=1000)[name]
        print(f"  MultiGoalPointMaze-{name}-v0 alone {1 / seconds:13,.0f} steps/s")
    print()

    agents = {}
    for name, flags in VARIANTS.items():
        args = drac_amort.Args(beta=0.5, **flags)
        agents[name] = drac_amort.DrAC(args, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    agents["the paper's way, plainly (M = 17)"] = PaperUpdate()
    buffer = drac_amort.ReplayBuffer(100_000, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    buffer.rows.uniform_(-1, 1)
    buffer.size = len(buffer.rows)
    buffer.rows[:, -1] = 0

    contenders = {name: lambda agent=agent: agent.update(buffer.sample(BATCH_SIZE)) for name, agent in agents.items()}
    x, weight = torch.randn(1024, 256), torch.randn(256, 256)
    product = f"a matrix product of {tuple(x.shape)} and {tuple(weight.shape)}"
    seconds = medians({**contenders, product: lambda: x @ weight})
    peak = 2 * x.numel() * weight.shape[1] / seconds[product]
    reference = seconds["the paper's way, plainly (M = 17)"]
    print(f"One update; the machine's matrix products reach {peak / 1e9:.0f} GFLOP/s")
    for name, function in contenders.items():
        flops = count_flops(function)
        share = flops / seconds[name] / peak
        print(
            f"  {name:34}{seconds[name] * 1e3:9.2f} ms{reference / seconds[name]:8.2f} x"
            f"{flops / 1e9:8.2f} GFLOP{share:6.0%} of the products' speed"
        )


if __name__ == "__main__":
    main()
