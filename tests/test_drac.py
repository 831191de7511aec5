"""The algorithm: every formula against an independent reference, every gradient where it should flow."""

import dataclasses
import math
from collections import namedtuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import one_script, random_batch
from torch import nn

import drac_amort
import drac_diffus


def numpy_diversity(actions, mean="geometric"):
    """The mean over all pairs, by two loops."""
    distances = [np.linalg.norm(actions[i] - actions[j], axis=-1) for i in range(len(actions)) for j in range(i)]
    return np.mean(np.log(distances) if mean == "geometric" else distances, axis=0)


# The flags' defaults

BOTH = {"num_envs": 1, "n_steps": 1, "hold_steps": 1.0, "num_action_samples": 17, "pairing": "disjoint"}
BOTH |= {"diversity_mean": "geometric", "hidden_size": 256, "actor_lr": 3e-4, "critic_lr": 3e-4, "alpha_lr": 5e-3}
BOTH |= {"gamma": 0.99, "tau": 0.005, "batch_size": 256, "buffer_size": 1_000_000, "learning_starts": 256}
BOTH |= {"updates_per_step": 1, "matmul_precision": "highest"}
PAPER = {drac_amort: {**BOTH, "z_dim": 16}, drac_diffus: {**BOTH, "diffusion_steps": 20, "clip": "hard"}}
NOT_OF_THE_METHOD = {"env_id", "env_kwargs", "seed", "paper", "run_dir", "evaluate", "resume", "cuda", "cudagraphs"}
NOT_OF_THE_METHOD |= {"checkpoint_interval", "evaluation_interval", "evaluation_episodes", "final_trials"}

MAZES = {"Simple": 100_000, "Medium": 200_000, "Hard": 300_000}
MAZES = {f"MultiGoalPointMaze-{name}-v0": steps for name, steps in MAZES.items()}
LEVELS = ["LevelGeneration-MultiFacet-v0", "LevelGeneration-Puzzle-v0"]
MUJOCO = [
    f"{name}-v{n}" for n in (4, 5) for name in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d")
]
TASKS = {env_id: (steps, 0.8, 0.8) for env_id, steps in MAZES.items()}  # steps, beta of DrAmort and of DrDiffus
TASKS |= {env_id: (500_000, 0.5, 0.5) for env_id in LEVELS} | {env_id: (1_000_000, 0.5, 0.2) for env_id in MUJOCO}


def test_paper_sets_every_default_to_what_was_published(script):
    for env_id, (steps, *betas) in TASKS.items():
        args = dataclasses.asdict(script.default_args(env_id, paper=True))
        found = {name: value for name, value in args.items() if name not in NOT_OF_THE_METHOD}
        beta = dict(zip([drac_amort, drac_diffus], betas, strict=True))[script]
        assert found == {**PAPER[script], "total_timesteps": steps, "beta": beta}
        assert (args["env_id"], args["paper"]) == (env_id, True)


def test_the_mazes_defaults_go_beyond_the_paper(script):
    for env_id in MAZES:
        args, paper = script.default_args(env_id), script.default_args(env_id, paper=True)
        assert min(args.num_envs, args.n_steps, args.hold_steps) > 1
        assert 0.6 < args.beta < 0.8346, "below its ceiling in two dimensions"
        assert args.num_action_samples < paper.num_action_samples and args.pairing == "all"
        for same in ("gamma", "tau", "batch_size", "hidden_size", "actor_lr", "critic_lr", "alpha_lr"):
            assert getattr(args, same) == getattr(paper, same)
        for flags in (args, paper):
            tests = flags.evaluation_interval, flags.evaluation_episodes, flags.final_trials
            assert tests == (flags.total_timesteps // 10, 100, 100)
        assert args.checkpoint_interval * args.num_envs == 50_000
        assert not args.paper
    assert script.Args.env_id in MAZES


def test_elsewhere_the_defaults_are_the_papers_but_for_the_estimator_the_clip_and_the_precision(script):
    for env_id in (*LEVELS, *MUJOCO):
        changes = {"paper": True, "num_action_samples": 17, "pairing": "disjoint", "matmul_precision": "highest"}
        changes |= {"clip": "hard"} if script is drac_diffus else {}
        args = script.default_args(env_id)
        assert args.num_action_samples < 17 and args.pairing == "all"
        assert (args.evaluation_interval, args.checkpoint_interval) == (10_000, 20_000)
        assert dataclasses.replace(args, **changes) == script.default_args(env_id, paper=True)
        assert (args.evaluation_episodes, args.final_trials) == ((30, 150) if env_id in LEVELS else (10, 100))
    assert script.default_args("Pendulum-v1") == script.Args("Pendulum-v1"), "an unknown id: what Args says"


def test_defaults_are_those_of_the_task_however_its_id_is_written(script):
    for env_id in TASKS:
        for other in (env_id.partition("-v")[0], f"envs:{env_id}"):
            assert dataclasses.replace(script.default_args(other), env_id=env_id) == script.default_args(env_id)


# The diversity estimator


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("num_samples", [2, 3, 4, 8])
def test_all_pairs_match_a_double_loop(script, num_samples, mean):
    actions = np.random.default_rng(0).uniform(-1, 1, (num_samples, 7, 3))
    estimate = script.pairwise_diversity(torch.as_tensor(actions), "all", mean)
    np.testing.assert_allclose(estimate.numpy(), numpy_diversity(actions, mean), atol=1e-7)


@pytest.mark.parametrize("num_samples", [2, 5, 17])
def test_disjoint_pairs_use_every_action_once_but_the_one_left_for_q(script, num_samples):
    actions = torch.rand(num_samples, 1, 2, requires_grad=True)
    pairs = num_samples // 2
    estimate = script.pairwise_diversity(actions, "disjoint")
    x, y = actions[:pairs].detach().numpy(), actions[pairs : 2 * pairs].detach().numpy()
    np.testing.assert_allclose(estimate.item(), np.log(np.linalg.norm(x - y, axis=-1)).mean(), atol=1e-4)
    estimate.sum().backward()
    assert (actions.grad[: 2 * pairs].abs().sum(dim=(1, 2)) > 0).all()
    assert (actions.grad[2 * pairs :] == 0).all()


@pytest.mark.parametrize(("pairing", "num_samples"), [("all", 2), ("all", 4), ("all", 8), ("disjoint", 17)])
def test_estimates_are_unbiased(script, pairing, num_samples):
    """For x, y uniform on [-1, 1], E log|x - y| = log 2 - 3/2."""
    torch.manual_seed(0)
    estimates = script.pairwise_diversity(2 * torch.rand(num_samples, 200_000, 1) - 1, pairing)
    standard_error = estimates.std().item() / math.sqrt(len(estimates))
    assert standard_error < 0.003
    assert abs(estimates.mean().item() - (math.log(2) - 1.5)) < 4 * standard_error


def test_all_pairs_vary_less_than_disjoint_pairs_of_the_same_samples(script):
    torch.manual_seed(0)
    actions = torch.rand(8, 50_000, 2)
    assert script.pairwise_diversity(actions, "all").var() < 0.8 * script.pairwise_diversity(actions, "disjoint").var()


def test_the_arcsine_law_attains_the_ceiling_of_beta_in_one_dimension(script):
    """Its E log|x - y| is -log 2, the logarithmic capacity of [-1, 1]: beta = 0.5."""
    torch.manual_seed(0)
    diversity = script.pairwise_diversity(torch.cos(math.pi * torch.rand(4, 400_000, 1))).mean().exp().item()
    assert diversity == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize(("mean", "floor"), [("geometric", math.log(1e-5)), ("arithmetic", 1e-5)])
def test_actions_that_coincide_have_the_diversity_of_a_distance_of_1e_5(script, mean, floor):
    estimate = script.pairwise_diversity(torch.zeros(4, 2, 3), "all", mean)
    torch.testing.assert_close(estimate, torch.full((2,), floor), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("pairing", ["all", "disjoint"])
def test_gradients_are_finite_at_and_near_coincidence(script, pairing, mean):
    coincident = torch.zeros(4, 2, 3, requires_grad=True)
    estimate = script.pairwise_diversity(coincident, pairing, mean)
    assert estimate.isfinite().all()
    estimate.sum().backward()
    assert (coincident.grad == 0).all()
    for distance in (1e-30, 1e-12, 1e-5):
        actions = (distance * torch.randn(4, 2, 3)).requires_grad_()
        script.pairwise_diversity(actions, pairing, mean).sum().backward()
        assert actions.grad.isfinite().all()


# Networks


def test_twin_q_equals_two_separate_networks(script, make_agent):
    qf, batch = make_agent().qf, random_batch(script)
    for i in range(2):
        layers = []
        for weight, bias in zip(qf.weights, qf.biases, strict=True):
            layer = nn.Linear(*weight.shape[1:])
            bound = layer.in_features**-0.5  # nn.Linear draws uniformly below it
            assert 0.8 * bound < weight[i].abs().max() <= bound
            assert bias[i].abs().min() > 0 and bias[i].abs().max() <= bound
            layer.weight.data, layer.bias.data = weight[i].T, bias[i, 0]
            layers += [layer, nn.ReLU()]
        value = nn.Sequential(*layers[:-1])(torch.cat([batch.obs, batch.actions], dim=1))[:, 0]
        torch.testing.assert_close(qf(batch.obs, batch.actions)[i], value)
    assert not torch.equal(*qf(batch.obs, batch.actions))


def test_both_networks_draw_weights_and_biases_of_their_own_around_zero(make_agent):
    qf = make_agent().qf
    for fan_in, *both in zip((8, 32, 32), qf.weights, qf.biases, strict=True):
        for parameter in both:
            assert not torch.equal(*parameter)
            if parameter[0].numel() > 1:
                assert (parameter.amin((1, 2)) < -0.5 * fan_in**-0.5).all()
                assert (parameter.amax((1, 2)) > 0.5 * fan_in**-0.5).all()


def test_logged_values_and_no_gradient_through_the_targets(script, make_agent):
    agent, batch = make_agent(), random_batch(script)
    loss, info = agent.critic_loss(batch, agent.actor.sample_latents(4, 16))
    assert info["qf_values"].item() == pytest.approx(agent.qf(batch.obs, batch.actions).mean().item())
    others = [agent.raw_alpha, *agent.actor.parameters()]
    assert torch.autograd.grad(loss, others, allow_unused=True) == len(others) * (None,)


def test_a_batch_of_one(script, make_agent):
    agent = make_agent(n_steps=2, num_envs=3, batch_size=1)
    buffer = script.ReplayBuffer(agent.args, 5, 3, torch.device("cpu"))
    buffer.rows.fill_(0.1)
    buffer.size = 4
    batch = buffer.sample(1)
    assert [tuple(x.shape) for x in batch] == [(1, 5), (1, 3), (1, 5), (1,), (1,)]
    assert agent.qf(batch.obs, batch.actions).shape == (2, 1)
    assert all(value.isfinite() for value in agent.update(batch).values())


def test_target_networks_begin_as_copies(make_agent):
    agent = make_agent()
    for target, source in zip(agent.qf_target.parameters(), agent.qf.parameters(), strict=True):
        assert torch.equal(target, source) and target.data_ptr() != source.data_ptr()


def test_actor_is_a_deterministic_function_into_the_action_box(script, make_agent):
    actor, obs = make_agent().actor, torch.randn(16, 5)
    latents = actor.sample_latents(4, 16)
    actions = actor(obs, latents)
    assert actions.shape == (4, 16, 3)
    assert actions.abs().max() <= 1
    torch.testing.assert_close(actor(obs, latents), actions, rtol=0, atol=0)
    assert (actor(obs, actor.sample_latents(4, 16)) - actions).abs().max() > 0.01
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    state = torch.get_rng_state()
    torch.testing.assert_close(*[actor.sample_latents(2, 3, generator) for generator in generators], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state), "a generator of one's own leaves the global one alone"


@pytest.mark.parametrize("through", ["Q", "diversity"])
def test_every_actor_parameter_gets_a_gradient(script, make_agent, through):
    agent, obs = make_agent(), torch.randn(16, 5)
    actions = agent.actor(obs, agent.actor.sample_latents(4, 16))
    objective = agent.qf(obs, actions[-1]).amin(dim=0).mean() if through == "Q" else agent.diversity(actions).mean()
    gradients = torch.autograd.grad(objective, agent.actor.parameters())
    inputs = {drac_amort: [5, 16], drac_diffus: [5, 3, drac_diffus.TIME_DIM]}[script]
    for (name, _), gradient in zip(agent.actor.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all(), name
        parts = gradient.split(inputs, dim=1) if name == "fc1.weight" else [gradient]
        assert all(part.abs().max() > 0 for part in parts), f"{name} (of fc1: the parts of each input)"


def test_update_survives_an_actor_whose_actions_coincide(script, make_agent):
    agent = make_agent()
    sample = agent.actor.sample_latents
    agent.actor.sample_latents = lambda *shape: sample(*shape)[..., :1, :, :].expand_as(sample(*shape))
    actions = agent.actor(torch.randn(4, 5), agent.actor.sample_latents(4, 4))
    assert (actions == actions[0]).all()
    for _ in range(3):
        losses = agent.update(random_batch(script))
        assert all(value.isfinite() for value in losses.values())
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


# Losses and the update


@pytest.mark.parametrize("raw", [-30.0, -2.0, -1e-3, 0.0, 1e-3, 3.0, 100.0])
def test_alpha_is_exp_below_zero_and_linear_above(make_agent, raw):
    agent = make_agent()
    agent.raw_alpha.data.fill_(raw)
    expected = math.exp(raw) if raw < 0 else 1 + raw
    assert agent.alpha().item() == pytest.approx(expected, abs=1e-7)
    agent.alpha().backward()
    assert agent.raw_alpha.grad.item() == pytest.approx(math.exp(min(raw, 0)), rel=1e-5)


@pytest.mark.parametrize(("excess", "direction"), [(-0.5, 1), (0.5, -1)])
def test_alpha_grows_while_diversity_is_below_its_target(make_agent, excess, direction):
    agent = make_agent(alpha_lr=0.1)
    assert agent.alpha().item() == 1
    loss, _ = agent.alpha_loss(torch.tensor(agent.target_diversity + excess))
    assert loss.item() == pytest.approx(excess)
    loss.backward()
    agent.alpha_optimizer.step()
    assert (agent.alpha().item() - 1) * direction > 0.05


def test_target_diversity_is_a_fraction_of_the_square_root_of_the_dimensions(make_agent):
    assert make_agent(action_dim=3, beta=0.7).target_diversity == pytest.approx(math.log(0.7 * math.sqrt(3)))
    arithmetic = make_agent(action_dim=3, beta=0.7, diversity_mean="arithmetic")
    assert arithmetic.target_diversity == pytest.approx(0.7 * math.sqrt(3))


def numpy_values(qf, obs, actions):
    """Both Q networks, by NumPy: (2, B)."""
    x = np.concatenate([obs, actions], axis=1)[None].repeat(2, axis=0)
    weights, biases = ([parameter.detach().numpy() for parameter in group] for group in (qf.weights, qf.biases))
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = np.maximum(np.einsum("qbi,qio->qbo", x, weight) + bias, 0)
    return (np.einsum("qbi,qio->qbo", x, weights[-1]) + biases[-1])[..., 0]


def test_critic_and_actor_loss_match_numpy(script, make_agent, float64):
    agent, batch = make_agent(), random_batch(script)
    agent.raw_alpha.data.fill_(1.5)
    for parameter in agent.qf_target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    arrays = script.Batch(*(tensor.numpy() for tensor in batch))
    latents = agent.actor.sample_latents(4, 16)

    next_actions = agent.actor(batch.next_obs, latents).detach().numpy()
    next_values = numpy_values(agent.qf_target, arrays.next_obs, next_actions[-1]).min(axis=0)
    targets = arrays.rewards + arrays.discounts * (next_values + 2.5 * numpy_diversity(next_actions))
    expected = sum(np.mean((value - targets) ** 2) for value in numpy_values(agent.qf, arrays.obs, arrays.actions))
    loss, info = agent.critic_loss(batch, latents)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert info["qf_loss"] == loss and not info["qf_loss"].requires_grad
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, agent.qf.parameters()))

    actions = agent.actor(batch.obs, latents)
    values = numpy_values(agent.qf, arrays.obs, actions[-1].detach().numpy()).min(axis=0)
    diversity = agent.diversity(actions).mean()
    loss, info = agent.actor_loss(batch.obs, actions, diversity)
    expected = numpy_diversity(actions.detach().numpy()).mean()
    assert loss.item() == pytest.approx(-np.mean(values) - 2.5 * expected, rel=1e-6)
    assert info["actor_loss"] == loss and not info["actor_loss"].requires_grad
    into_actions, into_alpha = torch.autograd.grad(loss, [actions, agent.raw_alpha], allow_unused=True)
    assert into_actions.isfinite().all() and (into_actions.abs().amax(dim=(1, 2)) > 0).all() and into_alpha is None
    _, info = agent.alpha_loss(diversity)
    assert info["alpha"].item() == 2.5 and info["diversity"].item() == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in info.values())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_action_samples": 17, "pairing": "disjoint"},
        {"diversity_mean": "arithmetic", "tau": 0.1, "actor_lr": 1e-3},
    ],
    ids=["default", "paper", "arithmetic"],
)
def test_update_equals_a_literal_reference(script, make_agent, float64, flags):
    """Three updates written out step by step: plain Adam, a Polyak loop, Q's parameters frozen for the actor."""
    agent, reference = make_agent(**flags), make_agent(**flags)
    args, alpha_of = reference.args, lambda w: torch.exp(w) if w < 0 else 1 + w
    pairing, mean = flags.get("pairing", "all"), flags.get("diversity_mean", "geometric")
    qf_adam = torch.optim.Adam(reference.qf.parameters(), lr=args.critic_lr)
    actor_adam = torch.optim.Adam(reference.actor.parameters(), lr=args.actor_lr)
    alpha_adam = torch.optim.Adam([reference.raw_alpha], lr=args.alpha_lr)
    for step in range(3):
        batch = random_batch(script, seed=step)
        torch.manual_seed(step)
        agent.update(batch)

        torch.manual_seed(step)
        alpha = alpha_of(reference.raw_alpha).item()
        next_actions = reference.actor(batch.next_obs, reference.actor.sample_latents(args.num_action_samples, 16))
        next_values = torch.minimum(*reference.qf_target(batch.next_obs, next_actions[-1]))
        targets = next_values + alpha * script.pairwise_diversity(next_actions, pairing, mean)
        targets = (batch.rewards + batch.discounts * targets).detach()
        qf_adam.zero_grad()
        sum(nn.functional.mse_loss(value, targets) for value in reference.qf(batch.obs, batch.actions)).backward()
        qf_adam.step()
        for target, source in zip(reference.qf_target.parameters(), reference.qf.parameters(), strict=True):
            target.data = (1 - args.tau) * target.data + args.tau * source.data

        reference.qf.requires_grad_(False)
        actions = reference.actor(batch.obs, reference.actor.sample_latents(args.num_action_samples, 16))
        diversity = script.pairwise_diversity(actions, pairing, mean).mean()
        actor_adam.zero_grad()
        (-torch.minimum(*reference.qf(batch.obs, actions[-1])).mean() - alpha * diversity).backward()
        actor_adam.step()
        reference.qf.requires_grad_(True)

        alpha_adam.zero_grad()
        (alpha_of(reference.raw_alpha) * (diversity.detach() - reference.target_diversity)).backward()
        alpha_adam.step()
    start = make_agent(**flags).state_dict()
    for name, value in reference.state_dict().items():
        assert not torch.equal(value, start[name]), f"{name} did not change"
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=name)


# Replay: windows of n steps

Transition = namedtuple("Transition", ["obs", "action", "next_obs", "reward", "terminated", "end"])


def random_step(rng, t, num_envs):
    """One step of every environment. An episode ends by termination, by time limit, or at a chapter's cut: all at once.

    All numbers differ, and float32 holds them exactly.
    """
    step = []
    for i in range(num_envs):
        obs, next_obs, action = (rng.normal(size=size).astype(np.float32) for size in (2, 2, 1))
        terminated, truncated, cut = rng.random() < 0.15, rng.random() < 0.15, t % 7 == 6
        step.append(Transition(obs, action, next_obs, float(100 * t + i), terminated, terminated or truncated or cut))
    return step


def add_step(buffer, step):
    buffer.add(*(np.array(column) for column in zip(*step, strict=True)))


def reference_window(transitions, gamma):
    """What a window of these transitions of one environment teaches: obs, action, next_obs, reward and discount."""
    reward, discount = 0.0, 1.0
    for transition in transitions:
        reward += discount * transition.reward
        discount *= gamma
        if transition.end:
            break
    discount *= not transition.terminated
    return [transitions[0].obs, transitions[0].action, transition.next_obs, reward, discount]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_windows_match_a_loop_over_transitions(script, float64, n_steps, num_envs):
    """At first, with one window per environment; with the ring filled in part, just full, and after it wrapped."""
    capacity, rng = 12, np.random.default_rng(0)
    args = script.Args(num_envs=num_envs, n_steps=n_steps, gamma=0.9, buffer_size=capacity * num_envs)
    buffer, steps, endings = script.ReplayBuffer(args, 2, 1, torch.device("cpu")), [], set()
    buffer.rows.fill_(math.nan)
    torch.manual_seed(0)
    for t in range(40):
        steps.append(random_step(rng, t, num_envs))
        add_step(buffer, steps[-1])
        assert buffer.size == min(t + 1, capacity)
        if t + 1 not in (n_steps, 8, 12, 13, 18, 23, 29, 40):
            continue
        windows = buffer.draw(2000)
        assert windows.shape == (2, 2000)
        batch = buffer.gather(windows)
        assert [tuple(tensor.shape) for tensor in batch] == [(2000, 2), (2000, 1), (2000, 2), (2000,), (2000,)]
        oldest, newest = max(0, t + 1 - capacity), t + 1 - n_steps  # the first steps of whole windows
        first_step = {first % capacity: first for first in range(oldest, newest + 1)}
        drawn = {tuple(window): b for b, window in enumerate(windows.T.tolist())}
        assert set(drawn) == {(row, i) for row in first_step for i in range(num_envs)}, "each whole window, no other"
        for (row, i), b in drawn.items():
            transitions = [step[i] for step in steps[first_step[row] : first_step[row] + n_steps]]
            for found, expected in zip(batch, reference_window(transitions, 0.9), strict=True):
                np.testing.assert_allclose(found[b].numpy(), expected, rtol=1e-12)
            endings |= {(transition.terminated, transition.end) for transition in transitions}
    assert endings == {(False, False), (False, True), (True, True)}


def test_one_step_windows_are_the_papers_transitions_exactly(script):
    args, rng = script.Args(num_envs=3, n_steps=1, gamma=0.99, buffer_size=60), np.random.default_rng(1)
    buffer, steps = script.ReplayBuffer(args, 2, 1, torch.device("cpu")), []
    assert buffer.rows.dtype == torch.float32
    for t in range(20):
        steps.append(random_step(rng, t, 3))
        add_step(buffer, steps[-1])
    rows, environments = windows = buffer.draw(500)
    batch = buffer.gather(windows)
    stored = [steps[row][i] for row, i in zip(rows.tolist(), environments.tolist(), strict=True)]
    obs, actions, next_obs, rewards, terminations, _ = (
        torch.as_tensor(np.array(column), dtype=torch.float32) for column in zip(*stored, strict=True)
    )
    expected = script.Batch(obs, actions, next_obs, rewards, 0.99 * (1 - terminations))
    assert all(torch.equal(found, value) for found, value in zip(batch, expected, strict=True))


@pytest.mark.parametrize("num_steps", [9, 12, 31])
def test_windows_are_drawn_uniformly(script, num_steps):
    args = script.Args(num_envs=3, n_steps=4, buffer_size=36)
    buffer, rng = script.ReplayBuffer(args, 2, 1, torch.device("cpu")), np.random.default_rng(0)
    for t in range(num_steps):
        add_step(buffer, random_step(rng, t, 3))
    torch.manual_seed(0)
    counts = torch.unique(buffer.draw(100_000), dim=1, return_counts=True)[1].double()
    num_windows = 3 * (min(num_steps, 12) - 4 + 1)
    assert len(counts) == num_windows
    chi_squared = ((counts - 100_000 / num_windows) ** 2 / (100_000 / num_windows)).sum().item()
    assert chi_squared < num_windows - 1 + 4 * math.sqrt(2 * (num_windows - 1))


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({"buffer_size": 10, "num_envs": 1}, 10),
        ({"buffer_size": 10, "num_envs": 3}, 4),
        ({"buffer_size": 1000, "total_timesteps": 30, "num_envs": 3}, 10),
    ],
)
def test_the_ring_has_room_for_the_buffers_size_or_the_whole_run(script, flags, rows):
    buffer = script.ReplayBuffer(script.Args(**flags), 2, 1, torch.device("cpu"))
    assert buffer.rows.shape[:2] == (rows, flags["num_envs"])


def test_a_step_of_too_few_environments_is_refused(script):
    buffer = script.ReplayBuffer(script.Args(num_envs=3), 2, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        add_step(buffer, random_step(np.random.default_rng(0), 0, 1))
    assert buffer.size == 0


class Recorder(gym.Wrapper):
    """Keeps all that happens in an environment."""

    def __init__(self, env):
        super().__init__(env)
        self.transitions = []

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action):
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.transitions.append(Transition(obs, action, self.obs, reward, terminated, terminated or truncated))
        return self.obs, reward, terminated, truncated, info


def test_every_batch_of_a_run_is_cut_out_of_what_its_environments_did(script, run, monkeypatch):
    """Windows end by termination, by the time limit of 7 steps and by a chapter's cut every 10; the ring wraps."""
    envs, batches, make, update = [], [], script.make, script.DrAC.update

    def make_recorder(*args, **kwargs):
        envs.append(Recorder(make(*args, **kwargs)))
        return envs[-1]

    def recording_update(agent, batch):
        batches.append(batch)
        return update(agent, batch)

    monkeypatch.setattr(script, "make", make_recorder)
    monkeypatch.setattr(script.DrAC, "update", recording_update)
    argv = ["--total-timesteps", "135", "--buffer-size", "60", "--learning-starts", "0", "--checkpoint-interval", "10"]
    argv += ["--num-envs", "3", "--n-steps", "4", "--gamma", "0.9", "--evaluation-interval", "0"]
    run(*argv, "--batch-size", "32", "--hidden-size", "32", "--final-trials", "0")
    assert [len(env.transitions) for env in envs] == [0] + 12 * [10] + 3 * [5], "one for its spaces, then in chapters"
    assert len(batches) == 45 - 3, "updates begin with the first whole window"
    windows = [env.transitions[t : t + 4] for env in envs for t in range(len(env.transitions))]
    windows = {tuple(window[0].obs): window for window in windows}
    endings = set()
    for batch in batches:
        for sample in zip(*(tensor.numpy() for tensor in batch), strict=True):
            window = windows[tuple(sample[0])]
            for found, expected in zip(sample, reference_window(window, 0.9), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            last = next((transition for transition in window if transition.end), window[-1])
            endings.add("terminated" if last.terminated else "time limit" if last.end else len(window))
    assert endings == {"terminated", "time limit", 4, 3, 2, 1}, "4: by none; less: by a chapter's cut"


# Held noise


def latents_over_time(noise, num_envs, num_steps, starts=None):
    """The latents of each step: (steps, environments, values)."""
    steps = range(num_steps)
    starts = np.zeros((num_steps, num_envs), bool) if starts is None else starts
    return torch.stack([noise(starts[step]).movedim(-2, 0).flatten(1) for step in steps])


def redraws(latents):
    """Whether an environment's noise is new, from the second step on. It is all new (but for chance) or all old."""
    share = (latents[1:] != latents[:-1]).double().mean(dim=-1)
    assert ((share == 0) | (share > 0.7)).all()
    return share > 0


def test_every_environment_has_noise_of_its_own(script, make_agent):
    actor = make_agent().actor
    latents = script.HeldLatents(actor, 10.0)(np.ones(4, bool))
    assert latents.shape == actor.sample_latents(1, 4).shape
    latents = latents.movedim(-2, 0).flatten(1)
    assert all((latents[i] != latents[j]).all() for i in range(4) for j in range(i))


def test_noise_held_for_one_step_is_fresh_at_every_step(script, make_agent):
    assert redraws(latents_over_time(script.HeldLatents(make_agent().actor, 1.0), 5, 100)).all()


def test_noise_is_kept_within_an_episode_and_redrawn_where_one_begins(script, make_agent):
    starts = np.random.default_rng(0).random((100, 5)) < 0.1
    latents = latents_over_time(script.HeldLatents(make_agent().actor, 1e9), 5, 100, starts)
    np.testing.assert_array_equal(redraws(latents).numpy(), starts[1:])


def test_the_noise_of_other_environments_is_not_taken_over(script, make_agent):
    """An evaluation of 30 episodes, then a single one, then 8 by the same policy."""
    actor = make_agent().actor
    noise = script.HeldLatents(actor, 1e9)
    for num_envs in (30, 1, 8):
        drawn = noise(np.ones(num_envs, bool))
        assert drawn.shape == actor.sample_latents(1, num_envs).shape
        assert torch.equal(noise(np.zeros(num_envs, bool)), drawn), "and held again"


def test_noise_is_held_for_so_many_steps_on_average_by_each_environment(script, make_agent):
    torch.manual_seed(0)
    hold_steps = 100 * [1.0, 2.0, 5.0, 20.0]
    changed = redraws(latents_over_time(script.HeldLatents(make_agent().actor, hold_steps), 400, 501))
    rates = changed.double().mean(dim=0).view(100, 4).mean(dim=0)  # 50,000 steps for each
    assert (1 / rates).tolist() == pytest.approx([1, 2, 5, 20], rel=0.05)
    together = (changed[:, 2::4].sum(dim=1) == 100).double().mean()
    assert together == 0, "each by a clock of its own"
    same = redraws(latents_over_time(script.HeldLatents(make_agent().actor, 5.0), 400, 126)).double().mean().item()
    assert 1 / same == pytest.approx(5, rel=0.05), "one number for all"


def test_noise_with_a_generator_of_its_own_repeats_and_leaves_the_global_one_alone(script, make_agent):
    actor, found = make_agent().actor, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(latents_over_time(script.HeldLatents(actor, 3.0, torch.Generator().manual_seed(7)), 4, 20))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


# Learning


def learner(script, make_agent, device="cpu", wrap=lambda update: update, **flags):
    """A small agent, its replay, and its update by drawn windows."""
    rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 5e-4}
    agent = make_agent(hidden_size=64, batch_size=64, buffer_size=1000, **rates, **flags)
    obs_dim, action_dim = flags["obs_dim"], flags["action_dim"]
    agent = script.DrAC(agent.args, obs_dim, action_dim, torch.device(device))
    buffer = script.ReplayBuffer(agent.args, obs_dim, action_dim, torch.device(device))
    return agent, buffer, wrap(lambda windows: agent.update(buffer.gather(windows)))


def learn_two_peaks(script, make_agent, beta, updates=3000, **options):
    """The share of a trained policy's actions near each of two equal peaks: one state, one action."""
    agent, buffer, update = learner(script, make_agent, obs_dim=1, action_dim=1, beta=beta, num_envs=2, **options)
    obs, ends = np.ones((2, 1)), np.ones(2, bool)
    for _ in range(updates):
        actions = script.act(agent.actor, obs, agent.actor.sample_latents(1, 2))
        rewards = 3 * np.exp(-((np.abs(actions[:, 0]) - 0.6) ** 2) / 0.05)
        buffer.add(obs, actions, obs, rewards, ends, ends)
        update(buffer.draw(64))
    actions = script.act(agent.actor, np.ones((2000, 1)), agent.actor.sample_latents(1, 2000))
    return (np.abs(actions - np.array([-0.6, 0.6])) < 0.3).mean(axis=0)


@pytest.mark.parametrize(
    ("script", "beta", "updates"), [(drac_amort, 0.36, 2250), (drac_amort, 0.02, 1000), (drac_diffus, 0.36, 1000)]
)
def test_bandit_with_two_peaks(script, make_agent, beta, updates):
    """A large target diversity covers both peaks, a small one picks one of them.

    The diffusion actor is not asked for the latter: nothing pushes it off either peak, and it keeps both.
    """
    shares = learn_two_peaks(script, make_agent, beta, updates)
    if beta == 0.36:
        assert shares.min() > 0.2, shares
        assert shares.sum() > 0.67, f"{shares}: uniform actions of this diversity have 0.63"
    else:
        assert shares.max() > 0.9 and shares.min() < 0.01, shares


@one_script
@pytest.mark.parametrize("n_steps", [5, 4])
def test_a_reward_that_comes_four_steps_late_takes_five_steps_to_be_learned(script, make_agent, n_steps):
    """Of an episode's 5 steps, only the first action counts, and only the last step pays for it: 10 times the action.

    No state on the way remembers the action. So a target that bootstraps before the end can tell nothing about it.
    """
    flags = {"obs_dim": 5, "action_dim": 1, "num_envs": 4, "n_steps": n_steps, "gamma": 0.9, "beta": 0.1}
    agent, buffer, update = learner(script, make_agent, **flags)
    states, rng = np.eye(5)[:, None].repeat(4, axis=1), np.random.default_rng(0)
    for _ in range(50):  # episodes of random actions
        actions = rng.uniform(-1, 1, (5, 4, 1))
        for t in range(5):
            ends = np.full(4, t == 4)
            buffer.add(states[t], actions[t], states[(t + 1) % 5], 10 * ends * actions[0, :, 0], ends, ends)
    for _ in range(600):
        update(buffer.draw(64))
    first = torch.eye(5)[:1].expand(101, -1)
    values = agent.qf(first, torch.linspace(-1, 1, 101)[:, None]).mean(dim=0).detach()
    actions = script.act(agent.actor, first, agent.actor.sample_latents(1, 101))
    if n_steps == 5:
        assert (values[-1] - values[0]).item() == pytest.approx(20 * 0.9**4, rel=0.2)
        assert actions.mean() > 0.5
    else:
        assert values.max() - values.min() < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_update_on_cuda_matches_the_cpu(script, make_agent):
    agent, cuda_agent = make_agent(), make_agent()
    cuda_agent = script.DrAC(cuda_agent.args, 5, 3, torch.device("cuda"))
    cuda_agent.load_state_dict(agent.state_dict())
    batch, latents = random_batch(script), agent.actor.sample_latents(4, 16)
    cuda_batch = script.Batch(*(tensor.cuda() for tensor in batch))
    losses = []
    for one, its_batch, its_latents in ((agent, batch, latents), (cuda_agent, cuda_batch, latents.cuda())):
        actions = one.actor(its_batch.obs, its_latents)
        losses.append([one.critic_loss(its_batch, its_latents)[0]])
        losses[-1].append(one.actor_loss(its_batch.obs, actions, one.diversity(actions).mean())[0])
    for expected, found in zip(*losses, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    args = script.Args(num_envs=4, n_steps=3, buffer_size=100)
    cpu_buffer, buffer = (script.ReplayBuffer(args, 5, 3, torch.device(device)) for device in ("cpu", "cuda"))
    cpu_buffer.rows.uniform_(-1, 1)
    cpu_buffer.rows[..., -2:] = (cpu_buffer.rows[..., -2:] > 0).float()
    buffer.rows.copy_(cpu_buffer.rows)
    buffer.size = len(buffer.rows)
    windows = buffer.draw(16)
    for found, expected in zip(buffer.gather(windows), cpu_buffer.gather(windows.cpu()), strict=True):
        torch.testing.assert_close(found.cpu(), expected)
    cuda_agent.update(buffer.sample(16))  # warms up
    torch.cuda.set_sync_debug_mode("error")  # neither sampling nor the update may wait for the device
    try:
        losses = [cuda_agent.update(buffer.sample(16)) for _ in range(3)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda and value.isfinite() for value in losses.values())
