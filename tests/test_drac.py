"""The algorithm: every formula against an independent reference, every gradient where it should flow."""

import math

import numpy as np
import pytest
import torch
from conftest import random_batch
from torch import nn

import drac_amort
import drac_diffus


def numpy_diversity(actions, mean="geometric"):
    """The mean over all pairs, by two loops."""
    distances = [np.linalg.norm(actions[i] - actions[j], axis=-1) for i in range(len(actions)) for j in range(i)]
    return np.mean(np.log(distances) if mean == "geometric" else distances, axis=0)


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
            assert 0.8 * bound < weight[i].abs().max() <= bound and bias[i].abs().max() <= bound
            layer.weight.data, layer.bias.data = weight[i].T, bias[i, 0]
            layers += [layer, nn.ReLU()]
        value = nn.Sequential(*layers[:-1])(torch.cat([batch.obs, batch.actions], dim=1))[:, 0]
        torch.testing.assert_close(qf(batch.obs, batch.actions)[i], value)
    assert not torch.equal(*qf(batch.obs, batch.actions))


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
    agent, batch = make_agent(gamma=0.9), random_batch(script)
    agent.raw_alpha.data.fill_(1.5)
    for parameter in agent.qf_target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    arrays = script.Batch(*(tensor.numpy() for tensor in batch))
    latents = agent.actor.sample_latents(4, 16)

    next_actions = agent.actor(batch.next_obs, latents).detach().numpy()
    next_values = numpy_values(agent.qf_target, arrays.next_obs, next_actions[-1]).min(axis=0)
    targets = arrays.rewards + 0.9 * (1 - arrays.terminations) * (next_values + 2.5 * numpy_diversity(next_actions))
    expected = sum(np.mean((value - targets) ** 2) for value in numpy_values(agent.qf, arrays.obs, arrays.actions))
    loss, info = agent.critic_loss(batch, latents)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert info["qf_loss"] == loss and not info["qf_loss"].requires_grad
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, agent.qf.parameters()))

    actions = agent.actor(batch.obs, latents).detach().numpy()
    values = numpy_values(agent.qf, arrays.obs, actions[-1]).min(axis=0)
    loss, info = agent.actor_loss(batch.obs, latents)
    assert loss.item() == pytest.approx(-np.mean(values + 2.5 * numpy_diversity(actions)), rel=1e-6)
    assert info["diversity"].item() == pytest.approx(numpy_diversity(actions).mean(), rel=1e-6)


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
        targets = (batch.rewards + args.gamma * (1 - batch.terminations) * targets).detach()
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


# The replay buffer


def test_buffer_stores_terminations_not_truncations_and_wraps_around(script):
    buffer = script.ReplayBuffer(3, 2, 1, torch.device("cpu"))
    transitions = [([i, -i], [i / 10], float(i), [i + 1, -i - 1], i == 4) for i in range(5)]
    for size, (obs, action, reward, next_obs, terminated) in enumerate(transitions, start=1):
        buffer.add(np.array(obs, np.float64), np.array(action), reward, np.array(next_obs), terminated)
        assert buffer.size == min(size, 3)
    assert buffer.rows.dtype == torch.float32
    torch.manual_seed(0)
    batch = buffer.sample(300)
    assert [tuple(tensor.shape) for tensor in batch] == [(300, 2), (300, 1), (300,), (300, 2), (300,)]
    assert set(batch.rewards.tolist()) == {2.0, 3.0, 4.0}, "the two oldest are overwritten"
    for obs, action, reward, next_obs, terminated in zip(*(tensor.tolist() for tensor in batch), strict=True):
        assert obs == [reward, -reward] and next_obs == [reward + 1, -reward - 1]
        assert action == pytest.approx([reward / 10])
        assert terminated == (reward == 4)
    counts = [(batch.rewards == reward).sum().item() for reward in (2, 3, 4)]
    assert min(counts) > 60, "uniformly"


def test_buffer_samples_only_what_was_stored(script):
    buffer = script.ReplayBuffer(1000, 1, 1, torch.device("cpu"))
    buffer.rows.fill_(math.nan)
    buffer.add(np.ones(1), np.ones(1), 1.0, np.ones(1), False)
    assert all((tensor == expected).all() for tensor, expected in zip(buffer.sample(50), (1, 1, 1, 1, 0), strict=True))


# Learning


def learn_two_peaks(script, make_agent, beta, updates=3000, device="cpu", wrap=lambda update: update):
    """The share of a trained policy's actions near each of two equal peaks: one state, one action."""
    rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 5e-4}
    args = make_agent(obs_dim=1, action_dim=1, hidden_size=64, batch_size=64, beta=beta, **rates).args
    torch.manual_seed(0)
    agent, buffer = script.DrAC(args, 1, 1, torch.device(device)), script.ReplayBuffer(1000, 1, 1, torch.device(device))
    update, obs = wrap(lambda: agent.update(buffer.sample(64))), np.ones((2, 1))
    for _ in range(updates):
        for action in agent.act(obs):
            reward = 3 * np.exp(-((np.abs(action) - 0.6) ** 2) / 0.05).item()
            buffer.add(obs[0], action, reward, obs[0], True)
        update()
    return (np.abs(agent.act(np.ones((2000, 1))) - np.array([-0.6, 0.6])) < 0.3).mean(axis=0)


@pytest.mark.parametrize(
    ("script", "beta", "updates"), [(drac_amort, 0.33, 3000), (drac_amort, 0.02, 1000), (drac_diffus, 0.33, 1000)]
)
def test_bandit_with_two_peaks(script, make_agent, beta, updates):
    """A large target diversity covers both peaks, a small one picks one of them.

    The diffusion actor is not asked for the latter: nothing pushes it off either peak, and it keeps both.
    """
    shares = learn_two_peaks(script, make_agent, beta, updates)
    if beta == 0.33:
        assert shares.min() > 0.2, shares
        assert shares.sum() > 0.67, f"{shares}: uniform actions have 0.3 and 0.3"
    else:
        assert shares.max() > 0.9 and shares.min() < 0.01, shares


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_update_on_cuda_matches_the_cpu(script, make_agent):
    agent, cuda_agent = make_agent(), make_agent()
    cuda_agent = script.DrAC(cuda_agent.args, 5, 3, torch.device("cuda"))
    cuda_agent.load_state_dict(agent.state_dict())
    batch, latents = random_batch(script), agent.actor.sample_latents(4, 16)
    cuda_batch = script.Batch(*(tensor.cuda() for tensor in batch))
    for loss in ("critic_loss", "actor_loss"):
        cpu_input, cuda_input = (batch, cuda_batch) if loss == "critic_loss" else (batch.obs, cuda_batch.obs)
        expected, _ = getattr(agent, loss)(cpu_input, latents)
        found, _ = getattr(cuda_agent, loss)(cuda_input, latents.cuda())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    buffer = script.ReplayBuffer(100, 5, 3, torch.device("cuda"))
    buffer.rows.uniform_(-1, 1)
    buffer.size.fill_(100)
    cuda_agent.update(buffer.sample(16))  # warms up
    torch.cuda.set_sync_debug_mode("error")  # neither sampling nor the update may wait for the device
    try:
        losses = [cuda_agent.update(buffer.sample(16)) for _ in range(3)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda and value.isfinite() for value in losses.values())
