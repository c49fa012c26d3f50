"""Small environments of the tests' own, made by --env-id envs:NAME-v0."""

from typing import ClassVar

import gymnasium as gym
import numpy as np

BOX = gym.spaces.Box(-1, 1, (1,))


class Tiny(gym.Env):
    """Two observations, one action; every keyword spoils or shapes one thing."""

    def __init__(
        self,
        low=-1.0,
        high=1.0,
        action_dim=1,
        length=None,
        reward_scale=1.0,
        obs_scale=1.0,
        bad=None,
        bad_at=50,
        noise=False,
    ):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (action_dim,))
        self.length, self.reward_scale, self.bad, self.bad_at = length, reward_scale, bad, bad_at
        self.scale, self.noise = np.array([1.0, obs_scale]), noise
        self.steps, self.actions = 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.obs = self.np_random.uniform(-1, 1, 2)
        return (self.obs * self.scale).astype(np.float32), {}

    def step(self, action):
        self.actions.append(np.array(action))
        self.steps += 1
        self.t += 1
        self.obs = np.clip(0.9 * self.obs + 0.1 * float(np.mean(action)) + 0.1 * self.np_random.normal(size=2), -1, 1)
        if self.noise:  # outside the environment's generator: cannot be played again
            self.obs = self.obs + np.random.default_rng().normal(size=2)
        obs, reward = (self.obs * self.scale).astype(np.float32), -self.reward_scale * float(self.obs @ self.obs)
        if self.steps == self.bad_at and self.bad == "observation":
            obs = obs * np.nan
        if self.steps == self.bad_at and self.bad == "reward":
            reward = np.inf
        return obs, reward, self.length is not None and self.t >= self.length, False, {}


class Drawn(Tiny):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((120, 240, 3), 40 + 5 * self.t, np.uint8)


class Space(gym.Env):
    """Of the wrong kind in one of its spaces."""

    def __init__(self, kind):
        self.observation_space, self.action_space = BOX, BOX
        if kind == "dict":
            self.observation_space = gym.spaces.Dict({"a": BOX})
        if kind == "image":
            self.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        if kind == "unbounded":
            self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,))
        if kind == "discrete":
            self.action_space = gym.spaces.Discrete(3)


class Broken(gym.Env):
    def __init__(self):
        raise OSError("the simulator\nis not installed")


gym.register("Tiny-v0", Tiny, max_episode_steps=20)
gym.register("Drawn-v0", Drawn, max_episode_steps=20)
gym.register("Space-v0", Space)
gym.register("Broken-v0", Broken)
