"""The two actors, which are all that the two scripts may differ in, and that they differ in nothing else."""

import difflib
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import drac_amort
import drac_diffus


def make_actor(diffusion_steps, obs_dim=5, action_dim=3, clip="hard"):
    torch.manual_seed(0)
    args = drac_diffus.Args(hidden_size=32, diffusion_steps=diffusion_steps, clip=clip)
    return drac_diffus.Actor(args, obs_dim, action_dim)


def numpy_schedule(diffusion_steps):
    """beta_t of the variance-preserving schedule for t = 0..T (beta_0 unused), and abar_t as their running product."""
    t = np.arange(diffusion_steps + 1)
    betas = 1 - np.exp(-0.1 / diffusion_steps - 0.5 * (10 - 0.1) * (2 * t - 1) / diffusion_steps**2)
    betas[0] = 0
    return betas, np.cumprod(1 - betas)


def numpy_chain(predict_noise, bound, latents):
    """DDPM's sampler as in the textbook; predict_noise(x, t) is the network, latents[0] is x_T."""
    diffusion_steps = len(latents)
    betas, abars = numpy_schedule(diffusion_steps)
    x, later_noise = latents[0], iter(latents[1:])
    for t in reversed(range(1, diffusion_steps + 1)):
        beta, abar, abar_prev = betas[t], abars[t], abars[t - 1]
        x_0 = bound((x - np.sqrt(1 - abar) * predict_noise(x, t)) / np.sqrt(abar))
        mean = np.sqrt(abar_prev) * beta / (1 - abar) * x_0 + np.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
        variance = beta * (1 - abar_prev) / (1 - abar)
        x = mean + np.sqrt(variance) * next(later_noise) if t > 1 else mean
    assert next(later_noise, None) is None, "all noise is used"
    return x


def with_noise_function(actor, predict_noise):
    """Replace the network of a one-dimensional actor by any function of x (B,) and t.

    The first layer passes on x + 1000, which its ReLU leaves alone, and t; the last one computes the function.
    """
    time_dim = drac_diffus.TIME_DIM

    class Times(nn.Module):
        def forward(self, sinusoids):
            steps = torch.arange(1, len(sinusoids) + 1)[:, None]
            return nn.functional.pad(steps.to(sinusoids.dtype), (0, time_dim - 1))

    class Noise(nn.Module):
        def forward(self, hidden):
            x, t = hidden[..., 0] - 1000, hidden[..., 1]
            assert (t == t.flatten()[0]).all()
            return predict_noise(x, int(t.flatten()[0]))[..., None]

    with torch.no_grad():
        actor.fc1.weight.zero_()
        actor.fc1.bias.zero_()
        obs_dim = actor.fc1.weight.shape[1] - 1 - time_dim
        actor.fc1.weight[0, obs_dim] = 1
        actor.fc1.weight[1, obs_dim + 1] = 1
        actor.fc1.bias[0] = 1000
    actor.time_mlp, actor.fc2, actor.fc3 = Times(), nn.LeakyReLU(1.0), Noise()  # of these the second only copies
    return actor


# The amortized actor


def test_amortized_actor_equals_an_mlp_on_the_concatenation():
    torch.manual_seed(0)
    actor, obs = drac_amort.Actor(drac_amort.Args(hidden_size=32, z_dim=7), 5, 3), torch.randn(16, 5)
    latents = actor.sample_latents(4, 16)
    assert latents.shape == (4, 16, 7)
    assert latents.min() >= 0 and latents.max() <= 1 and latents.std() == pytest.approx(12**-0.5, rel=0.05)
    mlp = nn.Sequential(actor.fc1, nn.ReLU(), actor.fc2, nn.ReLU(), actor.fc3, nn.Tanh())
    torch.testing.assert_close(actor(obs, latents), mlp(torch.cat([obs.expand(4, 16, 5), latents], dim=-1)))


# The diffusion actor


@pytest.mark.parametrize("clip", ["hard", "tanh"])
@pytest.mark.parametrize("diffusion_steps", [1, 2, 5, 20])
def test_the_chain_equals_the_textbook_in_numpy(float64, diffusion_steps, clip):
    """The network on the concatenation of state, x_t and time embedding, one sample after the other."""
    actor, obs = make_actor(diffusion_steps, clip=clip), np.random.default_rng(0).normal(size=(6, 5))
    latents = actor.sample_latents(4, 6)
    assert latents.shape == (diffusion_steps, 4, 6, 3)
    weights = {name: parameter.detach().numpy() for name, parameter in actor.named_parameters()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def predict_noise(x, t, state):
        angles = t / 10_000 ** (np.arange(8) / 8)
        embedding = np.concatenate([np.sin(angles), np.cos(angles)])
        embedding = linear("time_mlp.2", np.maximum(linear("time_mlp.0", embedding), 0))
        hidden = np.maximum(linear("fc1", np.concatenate([state, x, embedding])), 0)
        return linear("fc3", np.maximum(linear("fc2", hidden), 0))

    actions = actor(torch.as_tensor(obs), latents).detach().numpy()
    bound = np.tanh if clip == "tanh" else lambda x: np.clip(x, -1, 1)
    for m in range(4):
        for b in range(6):
            expected = numpy_chain(lambda x, t, b=b: predict_noise(x, t, obs[b]), bound, latents[:, m, b].numpy())
            np.testing.assert_allclose(actions[m, b], expected, atol=1e-12)


@pytest.mark.parametrize("diffusion_steps", [1, 2, 5, 20])
def test_schedule_is_variance_preserving(diffusion_steps):
    np.testing.assert_allclose(make_actor(diffusion_steps).alphas_bar, numpy_schedule(diffusion_steps)[1], rtol=1e-12)


@pytest.mark.parametrize("diffusion_steps", [1, 2, 5, 20, 100])
def test_affine_noise_gives_the_closed_form(float64, diffusion_steps):
    """With e = k x + c each step is x -> A_t x + B_t + sigma_t z: x_0 is a sum of products. Small: the clip is idle."""
    k, c = 0.7, 1e-4
    actor = with_noise_function(make_actor(diffusion_steps, action_dim=1), lambda x, t: k * x + c)
    latents = 1e-4 * actor.sample_latents(3, 4)
    betas, abars = numpy_schedule(diffusion_steps)
    betas, abar, abar_prev = betas[1:], abars[1:], abars[:-1]  # index i is step t = i + 1
    share_x0 = np.sqrt(abar_prev) * betas / (1 - abar)
    slopes = share_x0 * (1 - np.sqrt(1 - abar) * k) / np.sqrt(abar)
    slopes += np.sqrt(1 - betas) * (1 - abar_prev) / (1 - abar)
    offsets = -share_x0 * np.sqrt(1 - abar) * c / np.sqrt(abar)
    sigmas = np.sqrt(betas * (1 - abar_prev) / (1 - abar))
    later = np.concatenate([[1.0], np.cumprod(slopes)])  # product of the slopes of the steps that follow step t = i + 1
    noise = latents.numpy()[::-1]  # noise[i] enters x_{i+1}: with standard deviation 1 at i = T - 1, sigma_{i+2} before
    expected = later[-1] * noise[-1] + (later[:-1] * offsets).sum()
    for t in range(2, diffusion_steps + 1):
        expected = expected + later[t - 1] * sigmas[t - 1] * noise[t - 2]
    assert np.abs(expected).max() < 0.5
    np.testing.assert_allclose(actor(torch.zeros(4, 5), latents).detach().numpy(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("diffusion_steps", [1, 5, 20])
def test_the_ideal_noise_of_a_point_mass_reproduces_it(float64, diffusion_steps):
    abars = numpy_schedule(diffusion_steps)[1]
    actor = with_noise_function(
        make_actor(diffusion_steps, action_dim=1),
        lambda x, t: (x - math.sqrt(abars[t]) * 0.37) / math.sqrt(1 - abars[t]),
    )
    actions = actor(torch.zeros(50, 5), actor.sample_latents(4, 50))
    torch.testing.assert_close(actions, torch.full((4, 50, 1), 0.37), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("diffusion_steps", "ratio"), [(5, 0.47), (20, 0.77), (100, 0.93), (1000, 0.99)])
def test_a_gaussians_standard_deviation_converges_with_the_number_of_steps(float64, diffusion_steps, ratio):
    """For N(0, 0.3^2) and its ideal e, the chain is linear in its noise: the gradient at zero gives its variance."""
    abars = numpy_schedule(diffusion_steps)[1]
    actor = with_noise_function(
        make_actor(diffusion_steps, action_dim=1),
        lambda x, t: math.sqrt(1 - abars[t]) * x / (abars[t] * 0.3**2 + 1 - abars[t]),
    )
    latents = torch.zeros(diffusion_steps, 1, 1, 1, requires_grad=True)
    action = actor(torch.zeros(1, 5), latents)
    assert action.item() == pytest.approx(0, abs=1e-9)
    (gradient,) = torch.autograd.grad(action, latents)
    assert (gradient > 0).all(), "x_T and the noise of every later step but the last"
    assert gradient.norm().item() / 0.3 == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize("clip", ["hard", "tanh"])
def test_gradients_survive_a_long_chain(clip):
    norms = {}
    for diffusion_steps in (5, 100):
        actor = make_actor(diffusion_steps, clip=clip)
        actor(torch.randn(64, 5), actor.sample_latents(4, 64)).square().mean().backward()
        gradients = [parameter.grad for parameter in actor.parameters()]
        assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
        norms[diffusion_steps] = nn.utils.get_total_norm(gradients).item()
    assert 0.1 < norms[100] / norms[5] < 10, norms


# Acting


def test_the_noise_of_evaluations_is_not_that_of_the_weights(script, make_agent):
    """Both come from the run's seed."""
    agent, latents = make_agent(seed=0), []
    obs = np.zeros((100, 5), np.float32)
    agent.actor.register_forward_pre_hook(lambda actor, inputs: latents.append(inputs[1].flatten()))
    script.make_policy(agent)(obs, np.ones(100, bool))
    weights = agent.actor.fc1.weight.flatten()[: len(latents[0])]
    noise = latents[0][: len(weights)]
    torch.manual_seed(0)
    own = agent.actor.sample_latents(1, 100).flatten()[: len(weights)]
    assert abs(np.corrcoef(weights.detach(), noise)[0, 1]) < 0.2 and abs(np.corrcoef(own, noise)[0, 1]) < 0.2


def test_the_policy_that_acts_is_the_one_that_is_trained(script, make_agent):
    """Each environment's action is its own noise's, the same among others and alone, and no gradients are kept."""
    actor, obs = make_agent().actor, torch.randn(8, 5)
    latents = actor.sample_latents(1, 8)
    trained = actor(obs, torch.cat(4 * [latents], dim=-3))[2].detach().numpy()
    actions = script.act(actor, obs.double().numpy(), latents)
    assert type(actions) is np.ndarray and actions.shape == (8, 3) and actions.dtype == np.float32
    np.testing.assert_allclose(actions, trained, atol=1e-6)
    for i in range(8):
        alone = script.act(actor, obs[i : i + 1].numpy(), latents[..., i : i + 1, :])
        np.testing.assert_allclose(alone[0], trained[i], atol=1e-6)


# The twins


def test_the_scripts_share_all_but_the_actor_its_flags_and_its_defaults():
    def defined(script):
        return [name for name, value in vars(script).items() if getattr(value, "__module__", "") == script.__name__]

    shared = defined(drac_amort)
    assert shared == defined(drac_diffus), "the same things in the same order"
    assert {"HeldLatents", "ReplayBuffer", "TwinQ", "DrAC", "pairwise_diversity", "act", "train", "main"} < set(shared)
    for name in set(shared) - {"Actor", "Args", "default_args"}:
        ours, twins = (getattr(script, name) for script in (drac_amort, drac_diffus))
        if inspect.isroutine(ours) or not issubclass(ours, tuple):  # namedtuple writes its own source
            assert inspect.getsource(ours) == inspect.getsource(twins), name
    assert drac_amort.Batch._fields == drac_diffus.Batch._fields


def test_every_differing_line_is_about_the_actor():
    sources = []
    for script in (drac_amort, drac_diffus):
        source = Path(script.__file__).read_text()
        assert not re.search(r"^\s*(import|from) drac_(amort|diffus)", source, re.MULTILINE), (
            "each script can be copied out alone"
        )
        sources.append(source.replace(inspect.getsource(script.Actor), "").splitlines())
    differing = [line for line in difflib.ndiff(*sources) if line[0] in "-+"]
    about_the_actor = (
        r"DrAmort|DrDiffus|python drac_(amort|diffus)\.py|the actor is|z_dim|diffusion_steps|clip|TIME_DIM"
    )
    defaults = r"args\.beta = 0|paper: bool|17, \"disjoint\"|over n steps|\"HalfCheetah\""
    assert [line for line in differing if not re.search(f"{about_the_actor}|{defaults}", line)] == []
    assert 10 < len(differing) < 30
