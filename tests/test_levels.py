"""Level generation: rewards, divergences and playability against slow, literal references; environment and metrics."""

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import signal
import types
from collections import Counter
from pathlib import Path

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import forked
from gymnasium.utils.env_checker import check_env

import drac_amort
import envs

IDS = ["LevelGeneration-MultiFacet-v0", "LevelGeneration-Puzzle-v0"]
MAKE = functools.partial(drac_amort.make_env, IDS[0])
TILE = {name: index for index, name in enumerate(envs.TILES)}


def random_tiles(rng, width=16):
    """Levels whose patterns overlap a little: a few tiles only, most of them empty."""
    return rng.choice([0, 0, 0, 0, 1, 5], (16, width)).astype(np.int8)


def patterns(tiles):
    """How often each 2x2 pattern occurs, by two loops."""
    height, width = tiles.shape
    counts = Counter(
        (tiles[i, j], tiles[i, j + 1], tiles[i + 1, j], tiles[i + 1, j + 1])
        for i in range(height - 1)
        for j in range(width - 1)
    )
    return {pattern: count / counts.total() for pattern, count in counts.items()}


def kl(p, q):
    return sum(share * np.log2(share / q[key]) for key, share in p.items() if share > 0)


def reference_js(a, b):
    p, q = patterns(a), patterns(b)
    middle = {key: (p.get(key, 0) + q.get(key, 0)) / 2 for key in p.keys() | q.keys()}
    return (kl(p, middle) + kl(q, middle)) / 2


def reference_symmetric_kl(a, b):
    p, q = patterns(a), patterns(b)
    keys = p.keys() | q.keys()
    p, q = ({key: x.get(key, 0) + 1e-3 for key in keys} for x in (p, q))
    p, q = ({key: share / sum(x.values()) for key, share in x.items()} for x in (p, q))
    return (kl(p, q) + kl(q, p)) / 2


def reference_multifacet(new, history):
    total = caps = 0.0
    for i in range(5):  # 0 is the newest
        js, cap = reference_js(new, history[:, 64 - 16 * i : 80 - 16 * i]), 1 - i / 6
        total += min(cap, 1 - abs(js - 0.14) / 0.14)
        caps += cap
    return total / caps


def reference_puzzle(new, history):
    divergences = [reference_symmetric_kl(new, history[:, 64 - shift : 80 - shift]) for shift in range(0, 57, 8)]
    mean = sum(divergences) / 8
    penalty = (0.26 - mean) ** 2 if mean < 0.26 else (mean - 0.94) ** 2 if mean > 0.94 else 0
    if penalty > 1:
        penalty = 1 + np.log(penalty)
    return sum(sorted(divergences)[:3]) / 3 - 10 * penalty


REFERENCES = dict(zip(IDS, (reference_multifacet, reference_puzzle), strict=True))


# Divergences, playability and rewards


@pytest.mark.parametrize("seed", range(5))
def test_divergences_match_literal_references(seed):
    rng = np.random.default_rng(seed)
    a, b = random_tiles(rng), random_tiles(rng, 32)
    p, q = envs.pattern_histogram(a), envs.pattern_histogram(b)
    assert sum(p.values()) == pytest.approx(1) == sum(q.values())
    assert p == pytest.approx({np.ravel_multi_index(key, 4 * [12]): share for key, share in patterns(a).items()})
    both = envs.pattern_histogram(np.stack([a, a[::-1]]))
    assert both == pytest.approx(
        {key: (p.get(key, 0) + envs.pattern_histogram(a[::-1]).get(key, 0)) / 2 for key in both}
    )
    assert envs.js_divergence(p, q) == pytest.approx(reference_js(a, b), abs=1e-12)
    assert envs.symmetric_kl(p, q) == pytest.approx(reference_symmetric_kl(a, b), abs=1e-12)
    assert envs.js_divergence(p, p) == pytest.approx(0, abs=1e-12) == envs.symmetric_kl(p, p)
    ground = envs.pattern_histogram(np.ones((16, 16), np.int8))
    assert envs.js_divergence(ground, envs.pattern_histogram(np.zeros((16, 16), np.int8))) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_playable_means_no_gap_of_seven_columns(seed):
    rng = np.random.default_rng(seed)
    tiles = rng.choice(12, (16, 32), p=[0.7, *[0.3 / 11] * 11])
    solid = {"ground", "stone", "brick", "bonus", "pipe_rim", "pipe_shaft", "platform", "cannon"}
    gap = longest = 0
    for j in range(32):
        gap = 0 if {envs.TILES[tiles[14, j]], envs.TILES[tiles[15, j]]} & solid else gap + 1
        longest = max(longest, gap)
    assert envs.is_playable(tiles) == (longest < 7)


def test_gaps_of_six_and_seven_columns():
    level = np.zeros((16, 32), np.int8)
    level[15] = TILE["ground"]
    level[15, 10:16] = TILE["enemy"]
    assert envs.is_playable(level)
    level[15, 16] = TILE["trunk"]
    assert not envs.is_playable(level)
    level[14, 13] = TILE["platform"]
    assert envs.is_playable(level)


@pytest.mark.parametrize("seed", range(10))
def test_rewards_match_literal_references(seed):
    rng = np.random.default_rng(seed)
    history, new = random_tiles(rng, 80), random_tiles(rng)
    assert envs.multifacet_reward(new, history) == pytest.approx(reference_multifacet(new, history), abs=1e-12)
    assert envs.puzzle_reward(new, history) == pytest.approx(reference_puzzle(new, history), abs=1e-12)


def test_r_i_is_a_cap_not_a_weight(monkeypatch):
    """Where the divergence is ideal for all predecessors, the reward is 1; at twice the ideal from all, 0."""
    blank = np.zeros((16, 16), np.int8)
    for divergence, expected in ((0.14, 1), (0.28, 0), (0.42, -5 / (20 / 6)), (0.21, (4 * 0.5 + 2 / 6) / (20 / 6))):
        monkeypatch.setattr(envs, "js_divergence", lambda p, q, divergence=divergence: divergence)
        assert envs.multifacet_reward(blank, np.zeros((16, 80), np.int8)) == pytest.approx(expected)


@pytest.mark.parametrize(("mean", "penalty"), [(0.26, 0), (0.94, 0), (0.16, 0.01), (1.94, 1), (3.94, 1 + np.log(9))])
def test_puzzle_penalty_outside_of_the_bounds(monkeypatch, mean, penalty):
    monkeypatch.setattr(envs, "symmetric_kl", lambda p, q: mean)
    reward = envs.puzzle_reward(np.zeros((16, 16), np.int8), np.zeros((16, 80), np.int8))
    assert reward == pytest.approx(mean - 10 * penalty)


def test_a_repeating_level_ranks_below_a_moderately_novel_one_and_that_above_chaos():
    rng = np.random.default_rng(0)
    flat = np.zeros((16, 16), np.int8)
    flat[14:] = TILE["ground"]
    novel, history = flat.copy(), np.tile(flat, 5)
    novel[13, 3:7], novel[10, 8:12], novel[9, 9:11] = TILE["stone"], TILE["brick"], TILE["coin"]
    chaos = rng.choice(12, (16, 16)).astype(np.int8)
    for reward in (envs.multifacet_reward, envs.puzzle_reward):
        assert reward(novel, history) > reward(flat, history)
        assert reward(novel, history) > reward(chaos, history)


# The environment


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*alternative render modes")
def test_gymnasium_accepts_the_environment(env_id):
    check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_by_hand(env_id):
    """Observation, segments, reward and playability of two episodes, recomputed from the actions alone."""
    env, rng = gym.make(env_id), np.random.default_rng(0)  # make_env's rescaling would round the actions
    generator = env.unwrapped.generator
    joints = []
    for seed in (3, 4):
        obs, info = env.reset(seed=seed)
        latents = list(obs.reshape(5, 20))
        assert all(envs.is_playable(segment) for segment in generator.decode(np.stack(latents)))
        assert np.array_equal(info["segment"], generator.decode(latents[-1][None])[0])
        for step in range(1, 51):
            action = rng.uniform(-1, 1, 20).astype(np.float32)
            obs, reward, terminated, truncated, info = env.step(action)
            *history, segment = generator.decode(np.stack([*latents[-5:], action]))
            latents.append(action)
            np.testing.assert_array_equal(obs, np.concatenate(latents[-5:]))
            assert obs in env.observation_space
            np.testing.assert_array_equal(info["segment"], segment)
            joints.append(envs.is_playable(np.concatenate([history[-1], segment], axis=1)))
            assert info["playable"] == joints[-1]
            expected = REFERENCES[env_id](segment, np.concatenate(history, axis=1)) - (not joints[-1])
            assert reward == pytest.approx(expected, abs=1e-12)
            assert not terminated and truncated == (step == 50), "a time limit: it bootstraps"
    assert set(joints) == {True, False}


@pytest.mark.parametrize(("env_id", "num_new"), [(IDS[0], 1), (IDS[1], 2)])
def test_a_step_measures_only_the_windows_that_are_new(env_id, num_new, monkeypatch):
    calls = []
    histogram = envs.pattern_histogram
    monkeypatch.setattr(envs, "pattern_histogram", lambda tiles: calls.append(tiles) or histogram(tiles))
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    actions = np.random.default_rng(1).uniform(-1, 1, (10, 20))
    env.step(actions[0])
    calls.clear()
    for action in actions[1:]:
        env.step(action)
    assert 0 < len(calls) <= 9 * num_new


def test_the_reset_tells_of_its_joint_and_gives_its_history_away_only_as_a_copy():
    env, twin = (gym.make(IDS[0]).unwrapped for _ in range(2))
    joints = []
    for seed in range(70, 75):  # 72: a gap on either side of the joint
        obs, info = env.reset(seed=seed)
        twin.reset(seed=seed)
        joints.append(envs.is_playable(np.concatenate(list(env.generator.decode(obs.reshape(5, 20)[-2:])), axis=1)))
        assert info["playable"] == joints[-1]
        info["segment"][:], obs[:] = TILE["trunk"], 0
        for a, b in zip(env.step(np.zeros(20))[:2], twin.step(np.zeros(20))[:2], strict=True):
            np.testing.assert_array_equal(a, b)
    assert set(joints) == {True, False}


def play_in_forks():
    os.setsid()  # a group of its own, to be killed as one
    torch.set_num_threads(2)
    torch.nn.Conv2d(8, 8, 3)(torch.randn(64, 8, 64, 64)).sum().backward()
    make = functools.partial(drac_amort.make_env, IDS[1])
    vector = gym.vector.AsyncVectorEnv([make, make], context="fork")
    vector.reset(seed=0)
    vector.step(np.zeros((2, 20), np.float32))
    vector.close()


def test_environments_run_in_forks_of_a_process_that_has_used_openmp(tmp_path):
    process = forked(tmp_path, play_in_forks)
    try:
        process.join(timeout=120)
        assert process.exitcode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its forks, where they wait forever


@pytest.mark.parametrize("env_id", IDS)
def test_rollouts_repeat_and_survive_pickling(env_id):
    env = gym.make(env_id)
    twin = pickle.loads(pickle.dumps(env.unwrapped))
    first, second = env.reset(seed=1)[0], twin.reset(seed=1)[0]
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, env.reset()[0]) and np.array_equal(first, env.reset(seed=1)[0])
    env.action_space.seed(0)
    for _ in range(10):
        action = env.action_space.sample()
        for a, b in zip(env.step(action)[:4], twin.step(action)[:4], strict=True):
            np.testing.assert_array_equal(a, b)


def test_actions_are_clipped_and_starts_are_500_playable_segments():
    env, same = (gym.make(IDS[0]).unwrapped for _ in range(2))
    for each in (env, same):
        each.reset(seed=0)
    action = np.linspace(-3, 3, 20)
    np.testing.assert_array_equal(env.step(action)[0], same.step(np.clip(action, -1, 1))[0])
    assert env.starts.shape == (500, 20) and np.abs(env.starts).max() <= 1 and len(np.unique(env.starts, axis=0)) == 500
    assert all(envs.is_playable(segment) for segment in env.generator.decode(env.starts))


def test_the_fingerprint_is_that_of_the_generators_file(tmp_path):
    env = gym.make(IDS[0]).unwrapped
    assert env.fingerprint == hashlib.sha256(envs.LEVEL_GENERATOR.read_bytes()).hexdigest()
    weights = torch.load(envs.LEVEL_GENERATOR, weights_only=True)
    torch.save({**weights, "fc.bias": weights["fc.bias"] * 1.001}, tmp_path / "another.pt")
    assert gym.make(IDS[0], decoder_path=tmp_path / "another.pt").unwrapped.fingerprint != env.fingerprint


def test_the_generator_is_that_of_the_file_as_it_is_now(tmp_path, monkeypatch):
    weights = torch.load(envs.LEVEL_GENERATOR, weights_only=True)
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b", tmp_path / "a"), start=1):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        torch.save({**weights, "fc.bias": weights["fc.bias"] + number}, "gan.pt")
        os.utime("gan.pt", 2 * (max(number, 2),))  # the first two at once, the third later
        env = gym.make(IDS[0], decoder_path="gan.pt").unwrapped
        assert torch.equal(env.generator.fc.bias, weights["fc.bias"] + number)
    monkeypatch.chdir(tmp_path / "b")
    assert pickle.loads(pickle.dumps(env)).fingerprint == env.fingerprint
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "gan.pt").unlink()
    for name in ("gan.pt", "nul\0.pt"):
        with pytest.raises(ValueError, match="is missing"):
            envs.LevelGeneration(decoder_path=name)


def test_a_default_device_of_the_users_is_not_the_decoders():
    latents = np.zeros((1, 20))
    expected = gym.make(IDS[0]).unwrapped.generator.decode(latents)
    with torch.device("meta"):
        np.testing.assert_array_equal(envs.LevelGeneration().generator.decode(latents), expected)


def test_another_generator_and_files_that_are_none(tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    weights = torch.load(envs.LEVEL_GENERATOR, weights_only=True)
    torch.save(weights, tmp_path / "good one.pt")
    assert drac_amort.make_env(IDS[0], decoder_path=tmp_path / "good one.pt").reset(seed=0)[0].shape == (100,)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Canary(), protocol=2))
    torch.save({"weights": Canary()}, tmp_path / "zip.pt")
    torch.save({**weights, "fc.weight": weights["fc.weight"][:, :-1]}, tmp_path / "shape.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save({name: torch.zeros_like(weight) for name, weight in weights.items()}, tmp_path / "void.pt")
    torch.save({name: weight for name, weight in weights.items() if name != "starts"}, tmp_path / "startless.pt")
    for name, starts in (("far", 1.01), ("nan", math.nan)):
        torch.save(
            {**weights, "starts": weights["starts"].index_fill(0, torch.tensor(7), starts)}, tmp_path / f"{name}.pt"
        )
    torch.save({**weights, "starts": weights["starts"][:499]}, tmp_path / "few.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "good one.pt").read_bytes()[:5000])
    for name in ("pickle", "zip", "shape", "empty", "half", "missing", "startless", "few"):
        with pytest.raises(ValueError, match=f"{name}.pt is missing, damaged"):
            drac_amort.make_env(IDS[0], decoder_path=tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="missing, damaged"):
        drac_amort.make_env(IDS[0], decoder_path="")
    for name in ("void", "far", "nan"):
        with pytest.raises(ValueError, match=f"the starts in .*{name}.pt are not"):
            drac_amort.make_env(IDS[0], decoder_path=tmp_path / f"{name}.pt")
    assert not (tmp_path / "canary").exists()
    with pytest.raises(ValueError, match="reward_style must be .*'wrong'"):
        drac_amort.make_env(IDS[0], reward_style="wrong")
    with pytest.raises(ValueError, match="reward_style must be"):
        envs.LevelGeneration(reward_style=["puzzle"])


def test_rendering_draws_the_observed_segments():
    assert len({envs.TILE_SPRITES[i].tobytes() for i in range(12)}) == 12, "all tiles look different"
    env = gym.make(IDS[0], render_mode="rgb_array")
    env.reset(seed=0)
    segment = env.step(np.zeros(20))[-1]["segment"]
    picture = env.render()
    assert picture.shape == (128, 640, 3) and picture.dtype == np.uint8
    for i, j in itertools.product(range(16), range(16)):
        sprite = picture[8 * i : 8 * i + 8, 512 + 8 * j : 520 + 8 * j]
        np.testing.assert_array_equal(sprite, envs.TILE_SPRITES[segment[i, j]])


# Metrics


def test_hamming_distances_count_tiles():
    first, second = np.zeros((3, 16, 8), np.int8), np.zeros((3, 16, 8), np.int8)
    second[1, 0, :5], second[2] = 3, 1
    assert envs.hamming_distances(first, second).tolist() == [0, 5, 128]


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0),
        ([(2, 3)], 6),
        ([(1, 1), (2, 3)], 6),
        ([(2, 3), (3, 1)], 7),
        ([(3, 1), (1, 4), (2, 3)], 8),
        ([(2, 3), (2, 3), (-1, 9), (9, -1)], 6),
        ([(-1, -1)], 0),
    ],
)
def test_hypervolume_of_hand_made_points(points, area):
    assert envs.hypervolume(points, (0, 0)) == pytest.approx(area)
    assert envs.hypervolume(np.array(points).reshape(-1, 2) + [5, -2], (5, -2)) == pytest.approx(area)


def constant(obs, starts):
    return np.zeros((len(obs), 20))


def test_a_deterministic_policy_has_no_diversity_from_the_same_start(tmp_path):
    trials = envs.final_trials(constant, MAKE, 5, seed=0)
    assert trials["level_diversity_same_start"] == 0 < trials["level_diversity"] < 256, "only the start differs"
    assert envs.generate_levels(constant, MAKE, 2, seed=0).shape == (2, 16, 16 + 20 * 16)
    rng = np.random.default_rng(0)
    random = lambda obs, starts: rng.uniform(-1, 1, (len(obs), 20))  # noqa: E731
    trials = envs.final_trials(random, MAKE, 5, seed=0)
    assert 256 < trials["level_diversity_same_start"] <= trials["level_diversity"] < 5376

    def write(name, draw):
        with open(tmp_path / name, "wb") as stream:
            draw(stream)

    metrics = envs.evaluate_policy(random, MAKE, 3, seed=0, write=write)
    assert set(metrics) == {"episodic_return_mean", "episodic_return_std", "episodic_length_mean", "playable_rate"}
    assert metrics["episodic_length_mean"] == 50 and 0 < metrics["playable_rate"] < 1
    assert matplotlib.image.imread(tmp_path / "levels.png").shape[1] > 1000


def test_the_measures_of_levels_by_hand():
    def policy(obs, starts):  # a deterministic one
        return obs[:, :20] if starts[0] else np.tanh(3 * np.roll(obs[:, -20:], 1, axis=1))

    env, playable = MAKE(), []
    obs, _ = env.reset(seed=int(np.random.SeedSequence(0).generate_state(1)[0]))
    for step in range(50):
        obs, *_, info = env.step(policy(obs[None], np.array([step == 0]))[0])
        playable.append(info["playable"])
    assert set(playable) == {True, False}
    assert envs.evaluate_policy(policy, MAKE, 1, seed=0)["playable_rate"] == np.mean(playable)
    levels = envs.generate_levels(policy, MAKE, 3, seed=0)
    distances = [(levels[i] != levels[i - 1]).sum() for i in range(3)]
    trials = envs.level_trials(policy, MAKE, 3, seed=0)
    assert trials["level_diversity"] == np.mean(distances) and trials["level_diversity_same_start"] == 0
    assert trials["level_diversity_geometric"] == pytest.approx(np.prod(np.array(distances) + 1e-3) ** (1 / 3))


def test_the_pictured_levels_have_one_start():
    rng, written = np.random.default_rng(0), {}
    make = functools.partial(drac_amort.make_env, "LevelGeneration-MultiFacet-v0")
    policy = lambda obs, starts: rng.uniform(-1, 1, (len(obs), 20))  # noqa: E731
    metrics = envs.evaluate_policy(policy, make, 1, seed=0, write=written.__setitem__)
    levels, title = written["levels.png"].args
    assert len({level[:, :16].tobytes() for level in levels}) == 1
    assert len({level.tobytes() for level in levels}) == 8
    assert title == f"8 levels from one start; {metrics['playable_rate']:.1%} of all joints are playable"


def test_pairs_of_levels_are_disjoint(monkeypatch):
    first, second = np.zeros((3, 16, 336), int), np.arange(1, 4)[:, None, None] * np.ones((1, 16, 336), int)
    levels = iter([first, second])
    monkeypatch.setattr(envs, "generate_levels", lambda *_: next(levels))
    trials = envs.level_trials(None, None, 3, 0)
    assert trials["level_diversity"] == trials["level_diversity_same_start"] == 16 * 336


def test_a_single_pair_of_levels_has_two_starts():
    trials = envs.final_trials(constant, MAKE, 1, seed=0)
    assert trials["level_diversity_same_start"] == 0 < trials["level_diversity"]
    assert trials["level_diversity"] == envs.hamming_distances(*envs.generate_levels(constant, MAKE, 2, 0)[:, None])[0]


@pytest.mark.parametrize("api", ["legacy", "new"])
def test_levels_are_decoded_in_float32_whatever_the_precision_of_training(api):
    generator, latents = drac_amort.make_env(IDS[0]).unwrapped.generator, np.linspace(-1, 1, 20 * 500).reshape(500, 20)
    seen, expected = [], generator.decode(latents)
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    try:
        if api == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
        with generator.register_forward_hook(lambda *_: seen.append((cpu.fp32_precision, cuda.fp32_precision))):
            assert np.array_equal(generator.decode(latents), expected)
        assert seen == [("ieee", "tf32")], "what a GPU does is no concern of a CPU's decoder"
        assert (cpu.fp32_precision, cuda.fp32_precision) == ("bf16", "tf32")
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


def test_making_an_environment_leaves_the_random_state_and_the_number_of_threads_alone():
    envs._load_generator.cache_clear()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        drac_amort.make_env(IDS[0]).reset(seed=0)
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_the_generator_reproduces_its_recorded_metrics():
    record = json.loads((Path(envs.LEVEL_GENERATOR).with_suffix(".json")).read_text())["ladder"]["trained"]
    generator, _ = envs._load_generator(str(envs.LEVEL_GENERATOR))
    segments = generator.decode(np.random.default_rng(7).uniform(-1, 1, (1000, 20)))
    joints = [envs.is_playable(np.concatenate(pair, axis=1)) for pair in itertools.pairwise(segments)]
    distances = [(a != b).sum() for a, b in itertools.pairwise(segments)]
    divergences = [
        envs.js_divergence(*map(envs.pattern_histogram, pair)) for pair in itertools.pairwise(segments[:400])
    ]
    assert len(np.unique(segments, axis=0)) >= 950
    assert np.mean(joints) == pytest.approx(record["joint_playable"], abs=0.05)
    assert np.median(distances) == pytest.approx(record["hamming_median"], rel=0.1)
    assert np.median(divergences) == pytest.approx(record["pairwise_js_median"], abs=0.03)


# The training script


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(envs.LEVEL_GENERATOR.parent)
    return importlib.import_module("train_level_gan")


def test_training_brings_the_generator_towards_its_levels_and_averages_its_weights(training, monkeypatch):
    short = functools.partial(training.recompute_batch_norm, num_batches=2)
    monkeypatch.setattr(training, "recompute_batch_norm", short)
    windows = np.full((8, 16, 16), 3, np.int8)
    torch.manual_seed(1)
    start, moved, shares = training.LevelGenerator().fc.weight, [], []
    for averaging in (0.0, 0.999):
        args = training.Args(steps=20, batch_size=8, averaging=averaging, generator_lr=0.01, discriminator_lr=0.01)
        weights, _ = training.train(args, windows, seed=1)
        moved.append((weights["fc.weight"] - start).abs().mean().item())
        generator = training.LevelGenerator()
        generator.load_state_dict(weights)
        shares.append((generator.decode(np.zeros((4, 20))) == 3).mean())
    assert moved[0] > 10 * moved[1] > 0
    assert shares[0] > 0.9, "of the only tile that there is"


def test_what_training_leaves_makes_an_environment(training, tmp_path, monkeypatch):
    shipped = torch.load(envs.LEVEL_GENERATOR, weights_only=True)
    monkeypatch.setattr(training, "find_starts", lambda generator: shipped["starts"])  # its test is below
    independent = training.independent_tiles
    monkeypatch.setattr(training, "independent_tiles", lambda windows, num: independent(windows, 50))
    monkeypatch.setattr(training, "train", lambda *_: ({**shipped, "starts": torch.zeros(500, 20)}, 0.1))
    here = contextlib.nullcontext(types.SimpleNamespace(map=map))
    monkeypatch.setattr(training, "ProcessPoolExecutor", lambda *_, **__: here)
    for name, less in (("measure_generator", {"num": 50}), ("recompute_batch_norm", {"num_batches": 2})):
        monkeypatch.setattr(training, name, functools.partial(getattr(training, name), **less))
    training.main(training.Args(output_dir=tmp_path, num_levels=40, seeds=(1,)))
    made = gym.make(IDS[0], decoder_path=tmp_path / "level_gan.pt").unwrapped
    assert torch.equal(made.generator.starts, shipped["starts"])
    assert json.loads((tmp_path / "level_gan.json").read_text())["seed"] == 1 and (tmp_path / "level_gan.png").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"levels": Path("my levels"), "output_dir": envs.LEVEL_GENERATOR.parent}, "another generator"),
        ({"steps": 100, "output_dir": envs.LEVEL_GENERATOR.parent}, "another generator"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, -1)}, "--seeds"),
        ({"processes": 0}, "--processes"),
        ({"batch_size": 1}, "--batch-size"),
        ({"steps": 0}, "--steps"),
        ({"num_levels": 1}, "--num-levels"),
        ({"level_width": 15}, "--level-width"),
        ({"generator_lr": math.nan}, "--generator-lr"),
        ({"discriminator_lr": math.inf}, "--discriminator-lr"),
        ({"discriminator_lr": 0.0}, "--discriminator-lr"),
        ({"averaging": 1.0}, "--averaging"),
    ],
)
def test_the_training_refuses_settings_in_one_sentence_before_any_work(training, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        training.main(training.Args(**{"output_dir": tmp_path / "new", **flags}))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith(f"error: {named}") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_takes_no_files_is_refused_before_any_training(training, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.tempfile, "TemporaryFile", lambda dir: (dir / "none" / "file").touch())
    with pytest.raises(SystemExit) as stop:
        training.main(training.Args(output_dir=tmp_path, num_levels=10, steps=1))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


def test_level_files_may_begin_with_a_byte_order_mark(training, tmp_path):
    rows = "\n".join(["-" * 16] * 12 + ["X" * 16] * 2)
    for name, encoding in (("a", "utf-8-sig"), ("b", "utf-8")):
        (tmp_path / f"{name}.txt").write_text(rows, encoding=encoding)
    first, second = training.read_levels(tmp_path)
    assert first.shape == (16, 16) and np.array_equal(first, second)


def test_levels_without_ground_are_refused_before_any_training(training, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join([*["X" * 16] * 14, *["-" * 16] * 2]))
    with pytest.raises(SystemExit) as stop:
        training.main(training.Args(levels=tmp_path, output_dir=tmp_path / "new"))
    assert stop.value.code == 2 and "hardly any window can be crossed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_shipped_starts_are_those_that_the_training_finds(training):
    generator, _ = envs._load_generator(str(envs.LEVEL_GENERATOR))
    assert torch.equal(training.find_starts(generator), generator.starts)
