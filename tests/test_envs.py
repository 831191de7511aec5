"""The mazes, their metrics and their pictures, and the playing of episodes."""

import collections
import copy
import functools
import gc
import io
import itertools
import pickle
import tempfile
import weakref

import gymnasium as gym
import matplotlib.colors
import matplotlib.image
import mujoco
import numpy as np
import PIL.Image
import pytest
from gymnasium.utils.env_checker import check_env

import drac_amort
import envs

IDS = [f"MultiGoalPointMaze-{name}-v0" for name in ("Simple", "Medium", "Hard")]
SMALL_MAP = ["11111", "1rg01", "11111"]


def play(env, actions):
    """Step through `actions` until the episode ends; returns all observations, rewards and the last info."""
    observations, rewards = [env.reset(seed=0)[0]], []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.array(observations), rewards, terminated, info


# The environments


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*render")
def test_gymnasiums_own_checks(env_id):
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("env_id", "horizon", "goals"), list(zip(IDS, (150, 300, 600), (4, 4, 8), strict=True)))
def test_goals_and_horizons(env_id, horizon, goals):
    env = gym.make(env_id)
    assert len(env.unwrapped.goals) == goals
    observations, rewards, terminated, _ = play(env, itertools.repeat(np.zeros(2)))
    assert len(rewards) == horizon and not terminated and sum(rewards) == 0
    assert (observations == observations[0]).all(), "at rest without force"


def test_the_space_of_an_oblong_maze():
    env = gym.make(IDS[0], maze_map=["1111111", "1r000g1", "1111111"])
    assert env.observation_space.high.tolist() == [3.5, 1.5, *2 * [np.float32(envs.OBSERVED_SPEED)]]
    observations, *_ = play(env, itertools.repeat(np.array([1.0, 0.0])))
    assert all(map(env.observation_space.contains, observations))


def test_pictures_per_second_are_steps_per_second():
    env = gym.make(IDS[0]).unwrapped
    assert env.metadata["render_fps"] * env.model.opt.timestep * envs.FRAME_SKIP == pytest.approx(1)


def test_goals_are_numbered_in_reading_order():
    goals = gym.make("MultiGoalPointMaze-Hard-v0").unwrapped.goals
    assert goals.tolist() == [[-2, 6], [2, 6], [-6, 2], [6, 2], [-6, -2], [6, -2], [-2, -6], [2, -6]]


@pytest.mark.parametrize(("env_id", "expected"), list(zip(IDS, (0.19, 0.15, 0.55), strict=True)))
def test_success_of_a_uniform_random_policy(env_id, expected):
    """Reference: 300 episodes, against 120. The tolerance is four standard errors of the difference of the means."""
    env, rng = drac_amort.make_env(env_id), np.random.default_rng(0)
    episodes = envs.play_episodes(lambda obs, starts: rng.uniform(-1, 1, (len(obs), 2)), [env], 120, seed=0)
    success = np.mean([episode.infos[-1]["goal"] >= 0 for episode in episodes])
    assert success > 0
    assert abs(success - expected) < 4 * np.sqrt(expected * (1 - expected) * (1 / 300 + 1 / 120))


def test_symmetric_thrusts_reach_the_mirrored_goals_at_step_39():
    env, reached = gym.make("MultiGoalPointMaze-Simple-v0"), []
    for thrust in itertools.product((-1.0, 1.0), repeat=2):
        observations, rewards, terminated, info = play(env, itertools.repeat(np.array(thrust)))
        assert len(rewards) == 39 and terminated and rewards[-1] == 100 and sum(rewards) == 100
        goal = env.unwrapped.goals[info["goal"]]
        assert (np.sign(goal) == thrust).all()
        assert np.abs(info["position"] - goal).max() <= 0.5
        np.testing.assert_allclose(observations[-1, :2], info["position"], atol=1e-6)
        assert np.abs(observations[-2, :2] - goal).max() > 0.5
        reached.append(info["goal"])
    assert sorted(reached) == [0, 1, 2, 3]


def test_speed_is_observed_before_it_is_limited():
    env = gym.make("MultiGoalPointMaze-Simple-v0").unwrapped
    observations, *_ = play(env, itertools.repeat(np.array([1.0, 0.5])))
    fastest = np.abs(observations[:, 2:]).max()
    assert 5.4 < fastest < 5.5
    assert np.abs(env.data.qvel).max() <= 5 + 1e-9
    np.testing.assert_allclose(observations[1:40, 3], observations[1:40, 2] / 2, rtol=0.01, err_msg="direction is kept")


def test_a_corner_that_turns_all_speed_into_one_axis_stays_within_bounds():
    env = gym.make("MultiGoalPointMaze-Medium-v0")
    env.reset(seed=0)
    thrusts = 13 * [(-0.3, -0.3)] + 13 * [(1, 1)] + 5 * [(-0.3, 1)]
    observations = [env.step(np.array(thrust))[0] for thrust in thrusts]
    assert np.max(observations) > 5.9
    assert all(obs in env.observation_space for obs in observations)


@pytest.mark.parametrize("env_id", IDS)
def test_observations_stay_inside_their_space_and_walls_hold_at_full_speed(env_id):
    env, rng = gym.make(env_id).unwrapped, np.random.default_rng(0)
    walls = envs.cell_centers(env.maze_map, "1")
    for _ in range(40):
        env.reset()
        thrust = rng.uniform(-1, 1, 2) / 0.7
        for step in range(150):
            if step % 50 == 0:
                thrust = np.sign(rng.uniform(-1, 1, 2)) * (1, rng.uniform())
            obs, _, terminated, _, info = env.step(thrust)
            assert env.observation_space.contains(obs)
            assert np.abs(walls - info["position"]).max(axis=1).min() > 0.5, "inside a wall"
            if terminated:
                break


def test_actions_are_clipped():
    paths = [play(gym.make(IDS[0]), [np.array(action)] * 30)[0] for action in ([1.0, -1.0], [7.0, -100.0])]
    np.testing.assert_array_equal(*paths)


@pytest.mark.parametrize(("offset", "reached"), [([0.49, 0], True), ([0, -0.49], True), ([0.51, 0], False)])
def test_a_goal_is_the_whole_cell(offset, reached):
    env = gym.make(IDS[0]).unwrapped
    env.reset()
    env.data.qpos[:] = env.goals[0] + offset  # goal 0 is in the corner at the top left
    _, reward, terminated, _, info = env.step(np.zeros(2))
    assert (reward, terminated, info["goal"]) == ((100, True, 0) if reached else (0, False, -1))


def test_dense_reward_is_ten_times_the_approach_to_the_nearest_goal():
    env = gym.make(IDS[0], reward_type="dense")
    observations, rewards, _, _ = play(env, [np.array([0.3, 0.9])] * 25)
    distances = np.linalg.norm(observations[:, None, :2] - env.unwrapped.goals, axis=-1).min(axis=1)
    np.testing.assert_allclose(rewards, 10 * (distances[:-1] - distances[1:]), atol=1e-4)
    assert len(set(rewards)) > 20 and play(env, itertools.repeat(np.ones(2)))[1][-1] == 100
    assert play(env, [np.array([0.3, 0.9])] * 25)[1] == rewards, "each episode starts from its own distance"


def test_a_touch_pays_nothing_for_the_approach_either():
    env = gym.make(IDS[0], reward_type="dense", obstacles=True)
    _, rewards, terminated, info = play(env, itertools.repeat(np.ones(2)))
    assert terminated and info["goal"] == -1 and rewards[-2] > 0 and rewards[-1] == 0


def test_obstacles_end_the_episode_without_reward_and_are_free_without_the_test():
    latent = gym.make(IDS[0], obstacles=True).unwrapped
    observations, rewards, terminated, info = play(latent, itertools.repeat(np.ones(2)))
    assert terminated and rewards[-1] == 0 and info["goal"] == -1 and len(rewards) < 39
    np.testing.assert_allclose(np.abs(observations[-1, :2] - [2, 2]).max(), 0.5, atol=0.11)
    mujoco.mj_forward(latent.model, latent.data)
    touched = [contact for contact in latent.data.contact if contact.dist < -1e-6]
    assert len(touched) == 1, "the ball overlaps the obstacle by MuJoCo's account too"
    # Around it: straight right along the corridor, then up along the wall, is far from all obstacles.
    around = [np.array([1.0, 0.0])] * 60 + [np.array([0.2, 1.0])] * 90
    assert play(gym.make(IDS[0], obstacles=True), around)[3]["goal"] == 1


@pytest.mark.parametrize(("gap", "touches"), [((0.06, 0.06), True), ((0.08, 0.08), False), ((0.09, -0.5), True)])
def test_the_ball_is_round_at_an_obstacles_corner(gap, touches):
    env = gym.make(IDS[0], obstacles=True).unwrapped
    env.reset()
    env.data.qpos[:] = env.obstacle_centers[0] - 0.5 - gap
    assert env.step(np.zeros(2))[2] == touches


def test_episodes_repeat_and_environments_share_nothing():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (100, 2))
    alone = play(gym.make(IDS[2]), actions)[0]
    crowd = [gym.make(IDS[2]) for _ in range(envs.MAX_PARALLEL_ENVS)]
    for env in crowd:
        env.reset(seed=1)
    paths = [[env.reset()[0]] for env in crowd[:3]]
    for step, action in enumerate(actions[: len(alone) - 1]):
        for env, path, sign in zip(crowd, paths, (1, -1, 1), strict=False):
            if len(path) == step + 1:
                obs, _, terminated, _, _ = env.step(sign * action)
                path += [] if terminated and sign < 0 else [obs]
    np.testing.assert_array_equal(paths[0], alone)
    np.testing.assert_array_equal(paths[2], alone)
    assert not np.array_equal(paths[1], alone)
    for env in crowd:
        env.close()
    crowd[0].unwrapped.model.opt.timestep = 1.0
    assert crowd[1].unwrapped.model.opt.timestep == gym.make(IDS[2]).unwrapped.model.opt.timestep == 0.01


def test_environments_can_be_pickled():
    env = gym.make(IDS[1], reward_type="dense", obstacles=True).unwrapped
    twin = pickle.loads(pickle.dumps(env))
    assert (twin.maze_map, twin.reward_type, twin.obstacles) == (env.maze_map, "dense", True)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    np.testing.assert_array_equal(play(env, actions)[0], play(twin, actions)[0])


def test_a_copy_has_the_maze_of_the_original_whatever_became_of_its_file(tmp_path):
    (tmp_path / "maze.txt").write_text("1111\n1rg1\n1111")
    env = envs.MultiGoalPointMaze(tmp_path / "maze.txt")
    (tmp_path / "maze.txt").unlink()
    assert pickle.loads(pickle.dumps(env)).maze_map == copy.deepcopy(env).maze_map == env.maze_map


def test_environments_leave_neither_files_nor_memory_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    envs._build_model.cache_clear()
    env = gym.make(IDS[0], obstacles=True)
    play(env, itertools.repeat(np.ones(2)))
    env.close()
    left = weakref.ref(env.unwrapped)
    del env
    gc.collect()
    assert left() is None
    assert list(tmp_path.iterdir()) == []


def test_a_rendered_maze_shows_every_cell_and_the_ball_where_it_is():
    rows = ["1111111o", "1r0020g1", "10000001", "11111111"]
    env = gym.make(IDS[0], maze_map=rows, render_mode="rgb_array").unwrapped
    for steps in (0, 12):
        env.reset()
        for _ in range(steps):
            env.step(np.array([1.0, -1.0]))
        picture = env.render()
        assert picture.shape == (240, 480, 3) and picture.dtype == np.uint8
        corners = picture[3::60, 3::60]  # of the cells, which the ball does not cover
        for i, row in enumerate(rows):
            assert [tuple(color) for color in corners[i].tolist()] == [envs.CELL_COLORS[cell] for cell in row]
        ys, xs = np.nonzero((picture == 0).all(axis=-1))
        ball = np.array([xs.mean() / 60 - 4, 2 - ys.mean() / 60])
        np.testing.assert_allclose(ball, env.data.qpos, atol=0.02)
        assert len(xs) == pytest.approx(np.pi * 6**2, rel=0.2)
    assert len(set(envs.CELL_COLORS.values())) == 5, "the start is free"


# Actions


class Recorder(gym.Env):
    """Keeps the actions of its one-step episodes."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, action_space):
        self.action_space, self.actions = action_space, []

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.actions.append(action)
        return np.zeros(1, np.float32), 0.0, False, True, {}


def test_rescaled_actions_reach_the_bounds_of_any_box_and_never_leave_it():
    rng = np.random.default_rng(0)
    low = rng.normal(0, 10, 400).astype(np.float32)
    high = low + rng.uniform(0.1, 20, 400).astype(np.float32)
    low[0], high[0] = 2e38, 3e38  # their sum is too large
    gym.register("Test/Recorder-v0", Recorder, max_episode_steps=1)
    env = drac_amort.make_env("Test/Recorder-v0", action_space=gym.spaces.Box(low, high))
    for action in (-1, 1, 0, np.nextafter(np.float32(1), np.float32(0))):
        env.reset()
        env.step(np.full(400, action, np.float32))
        assert env.unwrapped.action_space.contains(env.unwrapped.actions[-1])
    middle = np.mean([low, high], axis=0, dtype=np.float64)
    np.testing.assert_allclose(env.unwrapped.actions[:3], [low, high, middle], rtol=1e-6, atol=1e-6)


# Maps


@pytest.mark.parametrize(
    ("maze_map", "message"),
    [
        ("simpel", "'simpel' is neither one of simple, medium, hard nor a text file that can be read"),
        ("/", "'/' is neither one of simple, medium, hard nor a text file that can be read"),
        ("", "'' is neither one of simple, medium, hard nor a text file that can be read"),
        ([], "a name, a text file or a list of non-empty strings, got []"),
        (["111", 5], "a name, a text file or a list of non-empty strings"),
        (["111", ""], "a name, a text file or a list of non-empty strings"),
        (None, "a name, a text file or a list of non-empty strings, got None"),
        (5, "a name, a text file or a list of non-empty strings, got 5"),
        (["1111", "1rg1", "111"], "row 2 of the maze map has 3 cells, row 0 has 4"),
        (["1111", "1rx1", "1111"], "unknown character 'x' in row 1, column 2"),
        (["1111", "10g1", "1111"], "exactly one start 'r', got 0"),
        (["11111", "1rrg1", "11111"], "exactly one start 'r', got 2"),
        (["1111", "1r01", "1111"], "at least one goal 'g', got none"),
        (["11111", "1r1g1", "11111"], "the goal in row 1, column 3 cannot be reached"),
        (["111111", "1gr1g1", "111111"], "the goal in row 1, column 4 cannot be reached"),
        (["11111", "1rgg1", "11111"], "the goal in row 1, column 3 cannot be reached"),  # behind another goal
        (["1111", "0rg1", "1111"], "row 1, column 0 can be left to the outside"),
        (["1o11", "1rg1", "1111"], "row 1, column 1 can be left to the outside"),
    ],
)
def test_a_wrong_map_gets_one_sentence(maze_map, message):
    for obstacles in (False, True):
        with pytest.raises(ValueError) as error:
            gym.make(IDS[0], maze_map=maze_map, obstacles=obstacles)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_goal_behind_a_latent_obstacle_is_out_of_reach_only_when_it_is_solid():
    for obstacles, goal in ((False, 0), (True, -1)):
        env = gym.make(IDS[0], maze_map=["11111", "1r2g1", "11111"], obstacles=obstacles)
        assert play(env, itertools.repeat(np.array([1.0, 0.0])))[3]["goal"] == goal


def test_a_map_from_a_text_file_is_the_map_of_its_rows(tmp_path):
    file = tmp_path / "a maze.txt"
    file.write_bytes("\r\n".join([*SMALL_MAP, "", ""]).encode("utf-8-sig"))  # with the mark that some editors write
    env, same = (gym.make(IDS[0], maze_map=maze_map).unwrapped for maze_map in (str(file), SMALL_MAP))
    assert env.maze_map == tuple(SMALL_MAP) and env.fingerprint == same.fingerprint
    right = itertools.repeat(np.array([1.0, 0.0]))
    np.testing.assert_array_equal(play(env, right)[0], play(same, right)[0])
    file.write_text("\n".join(["11111", "1r0g1", "11111"]))
    assert gym.make(IDS[0], maze_map=str(file)).unwrapped.fingerprint != same.fingerprint
    assert gym.make(IDS[0], maze_map=file).unwrapped.maze_map == ("11111", "1r0g1", "11111"), "a Path"
    file.write_text("1 1 1 1\n1 r g 1\n1 1 1 1\n")
    with pytest.raises(ValueError, match="unknown character ' ' in row 0, column 1"):
        gym.make(IDS[0], maze_map=file)
    assert len({gym.make(env_id).unwrapped.fingerprint for env_id in IDS}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the maze map's text file is empty"),
        (b"\n \n", "the maze map's text file is empty"),
        (b"11111\n1r0g1", "row 1, column 1 can be left to the outside"),
        (b"11111\n1r0g1\n1111", "row 2 of the maze map has 4 cells, row 0 has 5"),
        (b"\x89PNG\r\n\x1a\n\xff", "nor a text file that can be read"),
    ],
)
def test_a_malformed_map_file_gets_one_sentence(tmp_path, content, message):
    (tmp_path / "maze.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        gym.make(IDS[0], maze_map=str(tmp_path / "maze.txt"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_large_map_has_the_memory_it_needs():
    rows = ["1" * 201, "1r" + "0" * 197 + "g1", *60 * ["1" * 201]]
    observations, *_ = play(gym.make(IDS[0], maze_map=rows), 20 * [np.ones(2)])
    assert observations[-1, 0] > observations[0, 0] + 0.5 and np.isfinite(observations).all()


@pytest.mark.parametrize("wrong", [{"reward_type": "spare"}, {"obstacles": "false"}, {"obstacles": 0}])
def test_wrong_arguments_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        envs.MultiGoalPointMaze(**wrong)


# Metrics


@pytest.mark.parametrize("num_goals", [1, 2, 4, 5, 8])
def test_removal_success_rate_equals_the_enumeration_of_all_removals(num_goals):
    rng = np.random.default_rng(num_goals)
    for _ in range(30):
        group = rng.integers(-1, num_goals, 5)
        removals = list(itertools.combinations(range(num_goals), num_goals // 2))
        survived = [any(goal >= 0 and goal not in removed for goal in group) for removed in removals]
        assert envs.removal_success_rate(group, num_goals) == pytest.approx(np.mean(survived))


def test_removal_success_rate_of_two_goals_of_four_is_five_sixths():
    assert envs.removal_success_rate([0, 1, 1, 0, -1], 4) == pytest.approx(5 / 6)
    assert envs.removal_success_rate([0] * 5 + [-1] * 5, 4) == pytest.approx((1 / 2 + 0) / 2), "the mean over groups"
    release = [
        envs.removal_success_rate(goals, 4, half_is_safe=True) for goals in ([0, 1, 1, 0, -1], [0] * 5, [-1] * 5)
    ]
    assert release == [1, pytest.approx(1 / 2), 0]


def test_who_reached_nothing_is_safe_by_no_rule():
    assert [envs.removal_success_rate([-1] * 5, k, half_is_safe=True) for k in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert envs.removal_success_rate([0] * 5, 1, half_is_safe=True) == 1


def test_group_success_rate_counts_groups_with_any_success():
    assert envs.group_success_rate([-1, -1, -1, -1, 0] + [-1] * 5) == 0.5
    for metric in (envs.group_success_rate, lambda goals: envs.removal_success_rate(goals, 4)):
        with pytest.raises(ValueError):
            metric([0] * 7)


def test_maze_metrics_by_hand():
    metrics = envs.maze_metrics([0, 0, 0, 0, 0, 2, 2, 3, -1, -1], num_goals=4)
    assert metrics == {
        "success_rate": 0.8,
        "reachable_modes": 3,
        "multi_goal_score": pytest.approx(0.25 + 0.2 + 0.1),
        **{"goal_0": 5, "goal_1": 0, "goal_2": 2, "goal_3": 1},
    }
    assert envs.maze_metrics([0, 1, 2, 3] * 5, 4)["multi_goal_score"] == 1
    assert envs.maze_metrics([1] * 8, 4)["multi_goal_score"] == 0.25
    assert envs.maze_metrics([-1, -1], 4)["multi_goal_score"] == 0


# Playing and pictures


def toward(goals):
    """A policy that thrusts each environment's ball diagonally, by turns to the corners in `goals`."""
    signs = np.array([[-1, 1], [1, 1], [-1, -1], [1, -1]])

    def policy(obs, starts):
        started = np.abs(obs[:, 2:]).max(axis=1) > 0
        turns = np.where(np.arange(len(obs)) % 2 == 0, goals[0], goals[1])
        return np.where(started[:, None], np.sign(obs[:, :2] + 1e-6 * signs[turns]), signs[turns])

    return policy


class Countdown(gym.Env):
    """Episodes of so many steps; what happened is in `seeds` and `info`."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, length):
        self.length, self.seeds = length, []

    def reset(self, *, seed=None, options=None):
        self.left = self.length
        self.seeds.append(seed)
        return [1.0], {"playable": True, "picture": np.zeros(9)}

    def step(self, action):
        self.left -= 1
        info = {"playable": False, "picture": np.zeros(9)}
        return np.zeros(1, np.float32), np.array([1.5]), self.left == 0, False, info


def test_every_environment_plays_its_share_to_the_end():
    """Half of the environments have long episodes: the others must not fill the quota."""
    seen = []

    def policy(obs, starts):
        seen.append((obs[:, 0], starts))
        return np.zeros((len(obs), 1))

    countdowns = [Countdown(n) for n in (1, 9, 2)]
    episodes = envs.play_episodes(policy, countdowns, 8, seed=0)
    lengths = [len(episode.infos) - 1 for episode in episodes]
    assert lengths == [1, 9, 2, 1, 9, 2, 1, 9]
    assert [episode.episodic_return for episode in episodes] == [1.5 * length for length in lengths]
    assert all(
        episode.infos == [{"playable": True}, *n * [{"playable": False}]]
        for episode, n in zip(episodes, lengths, strict=True)
    )
    assert len(seen) == 3 * 9, "three rounds, side by side"
    for step, (obs, starts) in enumerate(seen):
        assert (starts == (step % 9 == 0)).all(), "the policy is told of an episode's first step, and of no other"
        assert step % 9 or obs[: 2 if step == 18 else 3].all()
    expected = np.random.SeedSequence(0).generate_state(8).tolist()
    assert [seed for seeds in itertools.zip_longest(*(env.seeds for env in countdowns)) for seed in seeds] == [
        *expected,
        None,
    ]
    assert len(set(expected)) == 8, "a seed for each"


def test_mazes_without_gymnasium_robotics_say_what_they_need(monkeypatch):
    envs._build_model.cache_clear()
    monkeypatch.setattr(envs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the mazes need the package gymnasium-robotics"):
        drac_amort.make_env(IDS[0], maze_map=["11111", "1r0g1", "11111"])


def test_an_episode_depends_on_its_seed_and_not_on_who_plays_beside_it():
    def returns(num_envs, num_episodes, seed):
        pendulums = [drac_amort.make_env("Pendulum-v1") for _ in range(num_envs)]
        episodes = envs.play_episodes(lambda obs, starts: np.zeros((len(obs), 1)), pendulums, num_episodes, seed)
        return [episode.episodic_return for episode in episodes]

    assert returns(1, 3, 7) == returns(3, 3, 7) == returns(2, 4, 7)[:3]
    assert len(set(returns(3, 3, 7) + returns(3, 3, 8))) == 6, "neighbouring seeds share no episode"


def test_evaluation_of_a_scripted_policy_and_its_picture(tmp_path):
    def write(name, content):
        with (tmp_path / name).open("wb") as stream:
            content(stream)

    make = functools.partial(drac_amort.make_env, IDS[0])
    metrics = envs.evaluate_policy(toward([0, 3]), make, 20, seed=0, write=write)
    assert metrics["success_rate"] == 1 and metrics["reachable_modes"] == 2 and metrics["multi_goal_score"] == 0.5
    assert metrics["episodic_return_mean"] == 100 and metrics["episodic_return_std"] == 0
    assert metrics["episodic_length_mean"] == 39
    assert [file.name for file in tmp_path.iterdir()] == ["trajectories.png"], "moving pictures only on request"
    assert min(matplotlib.image.imread(tmp_path / "trajectories.png").shape[:2]) > 400
    trials = envs.final_trials(toward([0, 3]), make, 2, seed=0)
    assert trials["removal_sr5"] == pytest.approx(5 / 6) and trials["obstacle_sr5"] == 0
    assert trials["removal_sr5_release"] == 1
    assert trials["success_rate"] == 1 and trials["goal_0"] == 5 and trials["goal_3"] == 5
    assert envs.final_trials(toward([0, 3]), make, 0, seed=0) == {}
    walled = functools.partial(drac_amort.make_env, IDS[0], obstacles=True)
    assert envs.final_trials(toward([0, 3]), walled, 2, seed=0)["success_rate"] == 0, "on the maze as trained on"


def test_obstacle_sr5_counts_groups_of_five():
    """Of ten episodes the first alone runs to the goal that is not cut off."""
    make = functools.partial(drac_amort.make_env, IDS[0], maze_map=["111111", "1gr2g1", "111111"])
    directions = np.array([[-1.0, 0.0], *9 * [[1.0, 0.0]]])
    trials = envs.final_trials(lambda obs, starts: directions, make, 2, seed=0)
    assert trials["success_rate"] == 1 and trials["obstacle_sr5"] == 0.5


def test_a_picture_has_every_path_in_its_goals_colour_and_every_goals_episodes(monkeypatch):
    figures, rows = [], envs.parse_map("simple")
    monkeypatch.setattr(envs.Figure, "savefig", lambda figure, file: figures.append(figure))
    paths = [np.random.default_rng(i).normal(size=(9, 2)) for i in range(4)]
    envs.plot_trajectories(rows, paths, [3, -1, 0, 3], "a title", None)
    (axes,) = figures[0].axes
    _, *lines = axes.lines  # the first is the start
    assert [line.get_color() for line in lines] == [envs.PALETTE[3], "#000000", envs.PALETTE[0], envs.PALETTE[3]]
    for line, path in zip(lines, paths, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), path)
    assert [text.get_text() for text in axes.texts] == ["1", "0", "0", "2"]
    assert [list(text.get_position()) for text in axes.texts] == envs.cell_centers(rows, "g").tolist()
    assert axes.get_title() == "a title"
    drawn = collections.defaultdict(list)
    for patch in axes.patches:
        drawn[patch.get_facecolor()[:3]].append(patch.get_center())
    for kind, color in (("1", "#3A3F47"), ("2", "#EDEDED")):
        assert np.array_equal(drawn[matplotlib.colors.to_rgb(color)], envs.cell_centers(rows, kind))


def test_the_picture_of_an_evaluation_has_whole_paths_and_a_title_that_counts():
    written, make = {}, functools.partial(drac_amort.make_env, IDS[0])
    envs.evaluate_policy(toward([0, 3]), make, 2, seed=0, write=written.__setitem__)
    _, paths, goals, title = written["trajectories.png"].args
    assert [len(path) for path in paths] == [40, 40] and not np.any([path[0] for path in paths])
    assert goals == [0, 3] and title == "2 of 2 episodes reach a goal, 2 of 4 goals are reached"


def test_every_level_is_drawn_in_its_row(monkeypatch):
    figures, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(envs.Figure, "savefig", lambda figure, file: figures.append(figure))
    levels = rng.integers(0, 12, (3, 16, 48))
    envs.plot_levels(levels, "a title", None)
    for axes, level in zip(figures[0].axes, levels, strict=True):
        assert np.array_equal(axes.images[0].get_array(), envs.level_image(level))
    assert figures[0].get_suptitle() == "a title"


def test_pictures_are_the_same_whatever_the_users_settings():
    rows, level = envs.parse_map("simple"), np.zeros((16, 48), int)
    drawings = [
        functools.partial(envs.plot_trajectories, rows, [np.zeros((2, 2))], [3], "100% of 1 episode"),
        functools.partial(envs.animate_trajectories, rows, [np.zeros((2, 2))], [3], "100% of 1 episode"),
        functools.partial(envs.plot_levels, [level], "a level"),
    ]

    def draw():
        for drawing in drawings:
            drawing(stream := io.BytesIO())
            yield stream.getvalue()

    usual = list(draw())
    with matplotlib.rc_context({"savefig.format": "pdf", "savefig.dpi": 99, "text.usetex": True, "text.color": "red"}):
        assert list(draw()) == usual


def test_pictures_of_tall_mazes_are_no_taller_than_a_screen():
    envs.plot_trajectories(
        ["111", "1r1", *400 * ["101"], "1g1", "111"], [np.zeros((2, 2))], [-1], "", io_bytes := io.BytesIO()
    )
    assert max(PIL.Image.open(io_bytes).size) < 2000


class Filmed(gym.Env):
    """Ten steps at 50 pictures per second."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, terminates=False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        self.steps, self.seed = 0, seed
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        end = self.steps >= 10
        return np.full(1, self.steps, np.float32), 0.0, end and self.terminates, end and not self.terminates, {}

    def render(self):
        return np.full((8, 8, 3), 20 * self.steps, np.uint8)


@pytest.mark.parametrize("terminates", [False, True])
def test_a_film_shows_an_episode_of_the_policy_at_its_own_speed(terminates):
    env, seen, file = Filmed(terminates), [], io.BytesIO()

    def policy(obs, starts):
        seen.append((obs.item(), starts.item()))
        return np.zeros((1, 1))

    envs.animate_episode(policy, lambda **kwargs: env, 7, file)
    assert seen == [(step, step == 0) for step in range(10)] and env.seed == 7
    gif = PIL.Image.open(file)
    assert gif.n_frames == 6 and gif.info["duration"] == 40, "every second of 11 pictures"


def test_a_film_lasts_as_long_as_its_longest_episode():
    file, paths = io.BytesIO(), [np.zeros((2, 2)), np.linspace([0, 0], [-4, 4], 20)]
    envs.animate_trajectories(envs.parse_map("simple"), paths, [-1, 0], "", file)
    gif, shares = PIL.Image.open(file), []
    for frame in (0, gif.n_frames - 1):
        gif.seek(frame)
        picture = np.asarray(gif.convert("RGB")).astype(int)
        corner = picture[: picture.shape[0] // 3, : picture.shape[1] // 3]
        shares.append((np.abs(corner - [0x00, 0x72, 0xB2]).max(axis=-1) < 40).sum())
    assert shares[1] > shares[0] + 10


def test_a_moving_picture_shows_all_balls_from_the_start_to_their_goals(tmp_path):
    def write(name, content):
        with (tmp_path / name).open("wb") as stream:
            content(stream)

    make = functools.partial(drac_amort.make_env, IDS[0])
    envs.evaluate_policy(toward([0, 3]), make, 4, seed=0, write=write, animate=True)
    gif = PIL.Image.open(tmp_path / "episodes.gif")
    assert gif.n_frames > 20
    shares = []
    for frame in (0, gif.n_frames - 1):
        gif.seek(frame)
        picture = np.asarray(gif.convert("RGB")).astype(int)
        height, width, _ = picture.shape
        corners = picture[: height // 3, : width // 3], picture[-height // 3 :, -width // 3 :]  # of goals 0 and 3
        colors = [0x00, 0x72, 0xB2], [0xCC, 0x79, 0xA7]
        shares += [(np.abs(x - c).max(axis=-1) < 40).sum() for x, c in zip(corners, colors, strict=True)]
    assert shares[2] > shares[0] + 10 and shares[3] > shares[1] + 10


@pytest.mark.parametrize(("middle", "action", "expected"), [("1r2g1", 1, 0), ("1gr2g1", 1, 0), ("1gr2g1", -1, 1)])
def test_obstacles_that_cut_off_a_goal_fail_the_episodes_that_run_for_it(middle, action, expected):
    wall = "1" * len(middle)
    make = functools.partial(drac_amort.make_env, IDS[0], maze_map=[wall, middle, wall])
    trials = envs.final_trials(lambda obs, starts: np.tile([action, 0.0], (len(obs), 1)), make, 2, seed=0)
    assert trials["success_rate"] == 1 and trials["obstacle_sr5"] == expected


class NoObstacles(envs.MultiGoalPointMaze):
    """A maze of one's own, in a class that has no `obstacles`."""

    def __init__(self):
        super().__init__(["11111", "1r0g1", "11111"])


def test_a_maze_that_refuses_obstacles_gets_no_score_for_them():
    gym.register("NoObstacles-v0", NoObstacles, max_episode_steps=100)
    make = functools.partial(drac_amort.make_env, "NoObstacles-v0")
    with pytest.raises(ValueError, match="obstacles"):
        envs.final_trials(lambda obs, starts: np.tile([1.0, 0.0], (len(obs), 1)), make, 2, seed=0)


def test_evaluation_closes_its_environments_when_an_episode_raises():
    closed = []

    class Raising(Countdown):
        def step(self, action):
            raise RuntimeError

        def close(self):
            closed.append(self)

    with pytest.raises(RuntimeError):
        envs.evaluate_policy(lambda obs, starts: np.zeros((len(obs), 1)), lambda: Raising(3), 3, seed=0)
    assert len(set(closed)) == 3


def test_evaluation_by_hand_closes_what_it_makes():
    made, closed, lengths = [], [], iter([1, 2, 6, 1])  # the last: the one whose kind is looked at

    def make():
        made.append(Countdown(next(lengths)))
        made[-1].close = lambda env=made[-1]: closed.append(env)
        return made[-1]

    metrics = envs.evaluate_policy(lambda obs, starts: np.zeros((len(obs), 1)), make, 3, seed=0)
    assert metrics == {
        "episodic_return_mean": 4.5,  # of 1.5, 3 and 9
        "episodic_return_std": pytest.approx((10.5) ** 0.5),
        "episodic_length_mean": 3,
    }
    assert len(made) == 4 and sorted(map(id, closed)) == sorted(map(id, made))


def test_evaluation_elsewhere_has_no_maze_metrics():
    policy, written = lambda obs, starts: np.zeros((len(obs), 1)), []
    make = functools.partial(drac_amort.make_env, "Pendulum-v1")
    metrics = envs.evaluate_policy(policy, make, 3, seed=0, write=lambda *file: written.append(file))
    assert set(metrics) == {"episodic_return_mean", "episodic_return_std", "episodic_length_mean"}
    assert metrics["episodic_length_mean"] == 200 and metrics["episodic_return_std"] > 0, "different starts"
    assert envs.evaluate_policy(policy, make, 3, seed=0) == metrics
    assert written == [] and envs.final_trials(policy, make, 2, seed=0) == {}
