"""Small environments of the tests' own, made by --env-id envs:NAME-v0 or, once this is imported, by NAME-v0."""

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
        same_array=False,
        strict=False,
        samples=False,
        reward_as_array=False,
    ):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (action_dim,))
        self.length, self.reward_scale, self.bad, self.bad_at = length, reward_scale, bad, bad_at
        self.scale, self.noise, self.same_array = np.array([1.0, obs_scale]), noise, same_array
        self.strict, self.samples, self.reward_as_array = strict, samples, reward_as_array
        self.steps, self.actions, self.out = 0, [], np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.own = np.random.default_rng(seed)
        self.t = 0
        self.obs = self.np_random.uniform(-1, 1, 2)
        return self.seen(), {}

    def seen(self):
        obs = (self.obs * self.scale).astype(np.float32)
        if self.same_array:
            self.out[:] = obs
            return self.out
        return obs

    def step(self, action):
        if self.strict and not self.action_space.contains(action):
            raise ValueError(f"{action!r} lies outside {self.action_space}")
        self.actions.append(np.array(action))
        self.steps += 1
        self.t += 1
        self.obs = np.clip(0.9 * self.obs + 0.1 * float(np.mean(action)) + 0.1 * self.np_random.normal(size=2), -1, 1)
        if self.samples:
            self.obs = self.obs + self.action_space.sample()[0]
        if self.noise == "own":
            self.obs = self.obs + self.own.normal(size=2)
        if self.noise is True:  # outside the environment's generator: cannot be played again
            self.obs = self.obs + np.random.default_rng().normal(size=2)
        obs, reward = self.seen(), -self.reward_scale * float(self.obs @ self.obs)
        if self.noise == "rewards":
            reward += np.random.default_rng().normal()
        if self.steps == self.bad_at and self.bad == "observation":
            obs = obs * np.nan
        if self.steps == self.bad_at and self.bad == "reward":
            reward = np.inf
        if self.steps == self.bad_at and self.bad == "evaluation" and 1000 <= self.np_random_seed < 1100:
            reward = np.nan
        if self.reward_as_array:
            reward = np.array([reward])
        return obs, reward, self.length is not None and self.t >= self.length, False, {}


class Drawn(Tiny):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((120, 240, 3), 40 + 5 * self.t, np.uint8)


class Blind(Drawn):
    def render(self):
        raise RuntimeError("no\nscreen")


class Blank(Drawn):
    def render(self):
        return None


class NoRate(Drawn):
    metadata: ClassVar = {"render_modes": ["rgb_array"]}


class Shown(Tiny):
    """In a window, which counts what it shows."""

    metadata: ClassVar = {"render_modes": ["human"], "render_fps": 100}
    shown = 0

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def step(self, action):
        Shown.shown += self.render_mode == "human"
        return super().step(action)


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
        if kind == "integer":
            self.action_space = gym.spaces.Box(-2, 2, (1,), np.int64)
        if kind == "flat":
            self.action_space = gym.spaces.Box(np.float32([-1, 0.5]), np.float32([1, 0.5]))


class Broken(gym.Env):
    def __init__(self):
        raise OSError("the simulator\nis not installed")


gym.register("Tiny-v0", Tiny, max_episode_steps=20)
gym.register("Endless-v0", Tiny)
gym.register("Drawn-v0", Drawn, max_episode_steps=20)
gym.register("Blind-v0", Blind, max_episode_steps=20)
gym.register("Blank-v0", Blank, max_episode_steps=20)
gym.register("NoRate-v0", NoRate, max_episode_steps=20)
gym.register("Shown-v0", Shown, max_episode_steps=20)
gym.register("Space-v0", Space, max_episode_steps=20)
gym.register("Broken-v0", Broken, max_episode_steps=20)
