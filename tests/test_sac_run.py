"""sac_continuous.py from command line to run folder, good and bad input."""

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import sac_continuous as sac

ROOT = Path(__file__).parent.parent
SMALL = "--total-steps 120 --learning-starts 40 --random-steps 40 --batch-size 16 --hidden-size 16 --torch-threads 1"
SMALL += " --compile never --eval-every 50 --eval-episodes 2 --checkpoint-every 60 --log-every 10"
TINY = f"--env-id Tiny-v0 {SMALL}"
BRIEF = f"{TINY} --total-steps 60 --eval-every 60"


def run(tmp_path, arguments, name="run"):
    """main() in this process, into tmp_path/name. Returns its exit code."""
    return sac.main([*arguments.split(), "--run-dir", str(tmp_path / name)])


def start(arguments, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *arguments.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def rows(run_dir):
    with open(run_dir / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(run_dir):
    return [{k: v for k, v in row.items() if k not in ("wall_time_s", "steps_per_s")} for row in rows(run_dir)]


def load(path):
    return torch.load(path, weights_only=True)


def same_policy(a, b):
    a, b = (load(x / "policy.pt")["state_dict"] for x in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def error_line(capsys):
    """What the one line says that the program ended with."""
    out, err = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip() and "it/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert err.endswith("\n") and "finished" not in out
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of TINY. Nothing may write into its folder."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, TINY) == 0
    return folder / "run"


class Bar(sac.tqdm):
    """Remembers how it was made and what it said."""

    said: types.SimpleNamespace

    def __init__(self, **settings):
        Bar.said = types.SimpleNamespace(settings=settings, descriptions=[], refreshed=[])
        super().__init__(**settings)

    def set_description(self, desc=None, refresh=True):
        self.said.descriptions.append(desc)
        self.said.refreshed += [desc] if refresh else []
        super().set_description(desc, refresh)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """The same run in an environment that can be drawn, recorded and logged more often: folder and the bar's words."""
    folder = tmp_path_factory.mktemp("filmed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac, "tqdm", Bar)
        arguments = f"{TINY} --env-id Drawn-v0 --capture-video --video-every 2 --log-every 3 --checkpoint-every 11"
        assert run(folder, arguments) == 0
    return folder / "run", Bar.said


def random_policy(path, **changes):
    """A policy file as bc.py and dagger.py write it: tanh, a shared deviation, no squashing."""
    shape = {"hidden_size": 5, "num_layers": 1, "activation": "tanh", "actor_std": "shared", "squash": False}
    torch.manual_seed(3)
    actor = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    state = {f"net.{name}": value for name, value in actor.state_dict().items()} | {"log_std": torch.zeros(1)}
    policy = {"format": "policy/1", "algorithm": "dagger", "env_id": "Tiny-v0", "env_kwargs": "{}"}
    policy |= {"max_episode_steps": None, "obs_dim": 2, "action_dim": 1, "action_low": [-1.0], "action_high": [1.0]}
    torch.save({**policy, **shape, "state_dict": state, **changes}, path)
    return actor


# ------------------------------------------------------------------------------------------------- the run folder


def test_a_run_as_a_process(tmp_path):
    arguments = f"--env-id HalfCheetah-v4 --temperature 0.2 {SMALL} --random-steps 60 --learning-starts 60"
    process = start(arguments.replace("--eval-every 50", "--eval-every 70 --max-episode-steps 30"), tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [line for line in re.split(r"[\r\n]", err) if line.strip() and "/120 [" not in line] == []
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v4__sac_continuous__1__\d{8}-\d{6}", run_dir.name)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]  # no MUJOCO_LOG.TXT
    assert f"--evaluate runs/{run_dir.name}" in out
    assert f"tensorboard --logdir runs/{run_dir.name}" in out
    curves = re.search(r"python (\S+plot.py) (\S+) --out \S+", out)
    assert curves[2] == f"runs/{run_dir.name}" and Path(curves[1]).exists()
    policy = load(run_dir / "policy.pt")
    assert (policy["format"], policy["algorithm"], policy["env_id"]) == ("policy/1", "sac", "HalfCheetah-v4")
    assert (policy["obs_dim"], policy["action_dim"], policy["action_low"]) == (17, 6, [-1.0] * 6)


def test_what_a_run_folder_holds(finished):
    names = sorted(path.name for path in finished.iterdir())
    assert [*names[:2], *names[3:]] == ["args.json", "checkpoint.pt", "policy.pt", "progress.csv"]
    assert names[2].startswith("events.out.tfevents.")
    text = (finished / "progress.csv").read_bytes()
    assert text.count(b"\n") == 4 and b"\r" not in text
    columns = "step wall_time_s eval_return_mean eval_return_std eval_length_mean train_return_mean train_length_mean"
    columns += " episodes critic_loss actor_loss q_values entropy temperature eval_q_mean eval_discounted_return_mean"
    assert {*rows(finished)[0]} == {*columns.split(), "steps_per_s"}
    assert [row["step"] for row in rows(finished)] == ["50", "100", "120"]
    assert [row["episodes"] for row in rows(finished)] == ["2", "5", "6"]
    assert [float(row["train_length_mean"]) for row in rows(finished)] == [20] * 3
    settings = json.loads((finished / "args.json").read_text())
    assert (settings["seed"], settings["gamma"], settings["compile"]) == (1, 0.99, "never")
    assert settings.keys() == vars(sac.Args()).keys()


def test_rows_say_what_the_training_episodes_returned(finished):
    stored = load(finished / "checkpoint.pt")["buffer"]
    returns = stored[:, 3].reshape(6, 20).sum(1).tolist()
    expected = [sum(returns[:2]) / 2, sum(returns[2:5]) / 3, returns[5]]
    assert [float(row["train_return_mean"]) for row in rows(finished)] == pytest.approx(expected, rel=1e-5)
    scalars = EventAccumulator(str(finished)).Reload()
    assert [event.value for event in scalars.Scalars("train/return")] == pytest.approx(returns, rel=1e-5)


def test_tensorboard_has_what_tells_a_healthy_run(finished):
    scalars = EventAccumulator(str(finished)).Reload()
    learning = "critic_loss q_values q_values_std target_values actor_loss entropy temperature policy_std"
    learning += " action_saturation weight_norm reward"
    assert {f"learning/{name}" for name in learning.split()} <= {*scalars.Tags()["scalars"]}
    assert [event.step for event in scalars.Scalars("learning/reward")] == [*range(10, 121, 10)]
    assert [event.step for event in scalars.Scalars("learning/critic_loss")] == [*range(50, 121, 10)]
    points = [(event.step, event.value) for event in scalars.Scalars("evaluation/eval_return_mean")]
    assert points == [(int(row["step"]), pytest.approx(float(row["eval_return_mean"]))) for row in rows(finished)]


def test_policy_file_of_the_default_network_is_under_a_megabyte(tmp_path):
    policy = {"state_dict": sac.Actor(17, 6, sac.Args()).state_dict()}
    sac.save(tmp_path / "policy.pt", policy)
    assert (tmp_path / "policy.pt").stat().st_size < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_same_seed_same_bytes_and_another_seed_others(tmp_path, finished):
    run(tmp_path, f"{TINY} --eval-every 7 --eval-episodes 3 --log-every 4 --checkpoint-every 13", "a")
    run(tmp_path, f"{TINY} --seed 2", "b")
    assert same_policy(tmp_path / "a", finished)
    a, b = (load(x / "checkpoint.pt") for x in (tmp_path / "a", finished))
    assert (
        torch.equal(a["buffer"], b["buffer"])
        and len(a["streams"]) == len(b["streams"])
        and all(map(torch.equal, a["streams"], b["streams"]))
    )
    assert not same_policy(tmp_path / "b", finished)
    last = {name: rows(tmp_path / "a")[-1][name] for name in ("critic_loss", "entropy")}
    assert last == {name: rows(finished)[-1][name] for name in last}


def test_first_random_steps_then_the_policy_and_updates_from_learning_starts(tmp_path, monkeypatch):
    calls, agents = [], []
    for name in ("random_action", "act", "update"):
        original = getattr(sac.Agent, name)

        def counted(agent, *arguments, name=name, original=original):
            calls.append((name, *arguments[1:]))
            agents.append(agent)
            return original(agent, *arguments)

        monkeypatch.setattr(sac.Agent, name, counted)
    assert run(tmp_path, f"{TINY} --random-steps 30 --learning-starts 45 --total-steps 60") == 0
    acted = [name for name, *_ in calls if name != "update"]
    assert acted == ["random_action"] * 30 + ["act"] * 30
    assert [arguments[0] for name, *arguments in calls if name == "update"] == [*range(45, 60)]
    stored = load(tmp_path / "run/checkpoint.pt")["buffer"]
    exploration = torch.Generator().manual_seed(np.random.SeedSequence(1).generate_state(3).tolist()[0])
    drawn = torch.stack([2 * torch.rand(1, generator=exploration) - 1 for _ in range(30)])
    assert torch.equal(stored[:30, 2:3], drawn)
    torch.manual_seed(1)  # step 30 to 44: samples of the actor as it was made
    actor = sac.Agent(agents[0].args, 2, 1).actor
    with torch.no_grad():
        for row in stored[30:45]:
            noise = torch.randn(1, generator=exploration)
            action, _ = actor.sample(*actor(row[:2]), noise)
            assert torch.allclose(action, row[2:3], atol=1e-6)


def test_a_plain_run_draws_at_random_for_a_tenth_of_it_at_most(tmp_path):
    for given, expected in {
        "--total-steps 3000": (300, 300),
        "--total-steps 3000 --random-steps 700": (700, 300),
        "--total-steps 3000 --learning-starts 0": (300, 0),
        "--total-steps 40000": (4000, 4000),
        "": (5000, 5000),
    }.items():
        args, _ = sac.parse_args(given.split())
        assert (args.random_steps, args.learning_starts) == expected
    few = SMALL.replace("--learning-starts 40 --random-steps 40", "")
    assert run(tmp_path, f"--env-id Tiny-v0 {few} --total-steps 50") == 0
    settings = json.loads((tmp_path / "run/args.json").read_text())
    assert (settings["random_steps"], settings["learning_starts"]) == (5, 5)


def test_evaluation_starts_from_the_same_states_and_reports_what_happened(tmp_path):
    args = sac.Args(env_id="Tiny-v0", hidden_size=8, device="cpu", compile="never", gamma=0.9)
    agent, env = sac.Agent(args, 2, 1), sac.make_env(args)
    first, second = (sac.evaluate(agent, env, 3) for _ in range(2))
    assert first == second

    returns, discounted, q, env = [], [], [], sac.make_env(args)  # again, by hand
    for seed in (1000, 1001, 1002):
        obs, _ = env.reset(seed=seed)
        rewards = []
        for t in range(20):
            with torch.no_grad():
                action = agent.actor(torch.from_numpy(obs)[None])[0].tanh()
                if t == 0:
                    q.append(agent.critic(torch.from_numpy(obs)[None], action).mean().item())
            obs, reward, _, truncated, _ = env.step(action[0].numpy())
            rewards.append(reward)
        assert truncated
        returns.append(sum(rewards))
        discounted.append(sum(0.9**t * r for t, r in enumerate(rewards)))
    assert len({*returns}) == 3
    by_hand = {"eval_return_mean": np.mean(returns), "eval_return_std": np.std(returns), "eval_length_mean": 20}
    by_hand |= {"eval_q_mean": np.mean(q), "eval_discounted_return_mean": np.mean(discounted)}
    assert first == pytest.approx(by_hand, rel=1e-5)


def test_truncated_transitions_bootstrap_and_terminated_ones_do_not(tmp_path, finished):
    kwargs = '{"length":10,"reward_scale":1000}'
    run(tmp_path, f"{TINY} --env-kwargs {kwargs}")
    flags, stored = {}, {}
    for name, run_dir in (("truncated", finished), ("terminated", tmp_path / "run")):
        stored[name] = load(run_dir / "checkpoint.pt")["buffer"]
        flags[name] = stored[name][:, -1].nonzero().flatten().tolist()
        # next_obs is the episode's own last observation, not the next episode's first
        ends = range(19, 119, 20) if name == "truncated" else range(9, 119, 10)
        assert all(not torch.equal(stored[name][i, 4:6], stored[name][i + 1, 0:2]) for i in ends)
        assert torch.equal(stored[name][0, 4:6], stored[name][1, 0:2])
    assert flags == {"truncated": [], "terminated": list(range(9, 120, 10))}
    reward, next_obs = stored["terminated"][:, 3], stored["terminated"][:, 4:6]
    assert torch.allclose(reward, -1000 * next_obs.square().sum(1), rtol=1e-4)  # as it is, however large


def test_an_environment_may_return_the_same_array_again_and_again(tmp_path):
    for name, value in (("own", "false"), ("same", "true")):
        assert run(tmp_path, f'{BRIEF} --env-kwargs {{"same_array":{value}}}', name) == 0
    own, same = (load(tmp_path / name / "checkpoint.pt")["buffer"] for name in ("own", "same"))
    assert (same[:, 0:2] != same[:, 4:6]).any(1).all()
    assert torch.equal(own, same)
    assert untimed(tmp_path / "own") == untimed(tmp_path / "same")


def test_an_environment_may_return_its_reward_in_an_array(tmp_path):
    for name, value in (("number", "false"), ("array", "true")):
        assert run(tmp_path, f'{BRIEF} --env-kwargs {{"reward_as_array":{value}}}', name) == 0
    assert untimed(tmp_path / "number") == untimed(tmp_path / "array")


def test_an_environment_may_sample_from_its_action_space(tmp_path):
    for name in ("a", "b"):
        np.random.seed(len(name))
        assert run(tmp_path, f'{BRIEF} --env-kwargs {{"samples":true}}', name) == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b") and same_policy(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("squash", [True, False])
def test_actions_reach_the_environments_own_bounds_and_no_further(squash):
    args = sac.Args(env_id="Tiny-v0", env_kwargs='{"low": -3, "high": 1, "action_dim": 2}', squash=squash)
    env = sac.make_env(args)
    env.reset(seed=0)
    for action in ([-1.0, 1.0], [0.0, 0.5], [-7, 7]):
        env.step(np.array(action, np.float32))
    assert np.allclose(env.unwrapped.actions, [[-3, 1], [-1, 0], [-3, 1]])


def test_no_rounding_takes_an_action_out_of_its_bounds():
    """A strict environment raises; without clipping after the rescaling a third of these pairs of bounds make it."""
    bounds = [(low / 10, high / 10) for low in range(-20, 20, 3) for high in range(low + 1, 21, 2)]
    low, high = (np.float32(side) for side in zip(*bounds, strict=True))
    gym.register("Bounded-v0", lambda: envs.Tiny(low, high, len(low), strict=True), max_episode_steps=20)
    env = sac.make_env(sac.Args(env_id="Bounded-v0"))
    env.reset(seed=0)
    for sign in (-1, 1, np.nextafter(np.float32(1), np.float32(0)), 1 + 1e-6):
        env.step(np.full(len(low), sign, np.float32))
    received = env.unwrapped.actions
    assert np.allclose(received[0], low) and np.allclose(received[1], high)


VARIANTS = [
    "--actor-gradient reinforce --num-actor-samples 3",
    "--num-critics 1 --critic-backup mean --temperature 0.1 --tau 1 --target-update-period 5",
    "--critic-backup double-q --lr-schedule linear",
    "--num-critics 4 --critic-backup redq --num-critic-updates 3",
    "--critic-backup value --temperature 0.2 --actor-std shared",
    "--no-squash --actor-std 0.1 --temperature 0 --activation silu --num-layers 1",
    "--no-squash --temperature 0.1 --no-backup-entropy --activation leaky-relu --num-actor-samples 2",
    "--activation selu --num-layers 3 --target-entropy -2 --buffer-size 30",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_its_policy_file_rebuilds_it(tmp_path, variant, capsys):
    assert run(tmp_path, f"{TINY} --total-steps 70 {variant}") == 0
    assert all(np.isfinite(float(row["critic_loss"])) for row in rows(tmp_path / "run"))
    assert sac.main(["--evaluate", str(tmp_path / "run"), "--eval-episodes", "2"]) == 0
    mean, std = re.search(r"return (\S+) \+- (\S+) over 2 episodes", capsys.readouterr().out).groups()
    assert float(mean) == pytest.approx(float(rows(tmp_path / "run")[-1]["eval_return_mean"]), abs=0.01)
    assert float(std) == pytest.approx(float(rows(tmp_path / "run")[-1]["eval_return_std"]), abs=0.01)


EXTREMES = [{"reward_scale": 1e6}, {"reward_scale": 1e-6}, {"obs_scale": 1e6}, {"obs_scale": 1e-6}]
EXTREMES += [{"action_dim": 17}, {"length": 1}, {"length": 2}]


@pytest.mark.parametrize("kwargs", EXTREMES, ids=str)
def test_extreme_problems_leave_everything_finite(tmp_path, kwargs):
    text = json.dumps(kwargs, separators=(",", ":"))
    assert run(tmp_path, f"{TINY} --env-kwargs {text} --total-steps 160 --eval-every 160") == 0

    def finite(value):
        if isinstance(value, torch.Tensor):
            return bool(value.isfinite().all()) if value.is_floating_point() else True
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        return all(map(finite, value)) if isinstance(value, list | tuple) else True

    assert all(finite(load(tmp_path / "run" / name)) for name in ("checkpoint.pt", "policy.pt"))


def test_steps_a_second_count_neither_evaluating_nor_saving(tmp_path, monkeypatch):
    slow = {"evaluate": 0.2, "save": 0.1}
    for name, seconds in slow.items():
        original = getattr(sac, name)

        def slowed(*arguments, original=original, seconds=seconds):
            time.sleep(seconds)
            return original(*arguments)

        monkeypatch.setattr(sac, name, slowed)
    original_update = sac.Agent.update

    def slow_update(*arguments):
        time.sleep(0.05)
        return original_update(*arguments)

    monkeypatch.setattr(sac.Agent, "update", slow_update)
    few = "--total-steps 18 --learning-starts 12 --eval-every 6 --checkpoint-every 3"
    assert run(tmp_path, f"{TINY} {few}") == 0
    found = [float(row["steps_per_s"]) for row in rows(tmp_path / "run")]
    assert found[0] > 25 and found[1] > 25  # of six random steps; with the sleeps at most 9
    assert found[2] < 20  # but updates count
    assert float(rows(tmp_path / "run")[0]["wall_time_s"]) > 0.2


def test_the_bar_says_what_goes_on(filmed):
    _, bar = filmed
    assert bar.settings["miniters"] == 1 and bar.settings["mininterval"] <= 1 and bar.settings["total"] == 120
    assert {*bar.descriptions} == {"training", "evaluating", "recording"}
    assert bar.refreshed.count("evaluating") == 3 and bar.refreshed.count("recording") == 2


# ------------------------------------------------------------------------------------------------------- learning


def test_pendulum_is_learned(tmp_path):
    settings = "--total-steps 5000 --random-steps 500 --learning-starts 500 --batch-size 128 --hidden-size 64"
    settings += " --actor-lr 1e-3 --critic-lr 1e-3 --temperature-lr 3e-3 --compile never --eval-every 1000"
    assert run(tmp_path, f"--env-id Pendulum-v1 {settings} --eval-episodes 5 --seed 5 --torch-threads 1") == 0
    returns = [float(row["eval_return_mean"]) for row in rows(tmp_path / "run")]
    assert returns[0] < -800
    assert max(returns[1:]) > -250
    assert float(rows(tmp_path / "run")[-1]["train_return_mean"]) > -250


def test_default_matrix_products_are_float32(finished):
    x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ y.double()
    assert ((x @ y) - exact).abs().max() / exact.abs().max() < 2e-6  # bfloat16 has 3e-3


# ------------------------------------------------------------------------------------------------- --evaluate, videos


def test_recording_changes_nothing_and_makes_videos(finished, filmed):
    filmed, _ = filmed
    assert same_policy(finished, filmed)
    assert untimed(finished) == untimed(filmed)
    videos = sorted((filmed / "videos").iterdir())
    assert [path.name for path in videos] == [f"step{step}-episode-0.mp4" for step in (100, 120)]
    with VideoFileClip(str(videos[0])) as clip:
        frames = np.stack(list(clip.iter_frames()))
    assert frames.shape == (21, 120, 240, 3)  # the first observation and 20 steps
    assert frames[:, 60:].mean((1, 2, 3)) == pytest.approx(40 + 5 * np.arange(21), abs=4)
    text = frames[:, :30].astype(int)
    assert all(frame.max() > 230 for frame in text)  # white on grey
    assert all(np.abs(before - after).max() > 100 for before, after in itertools.pairwise(text))
    events = EventAccumulator(str(filmed)).Reload()
    assert [event.step for event in events.Images("evaluation/video")] == [100, 120]
    with Image.open(io.BytesIO(events.Images("evaluation/video")[-1].encoded_image_string)) as animation:
        assert (animation.format, animation.n_frames, animation.size) == ("GIF", 6, (120, 60))  # steps 0, 4, ... 20
        for i in range(6):
            animation.seek(i)
            assert np.asarray(animation.convert("RGB"))[40:].mean() == pytest.approx(40 + 20 * i, abs=4)


def test_the_text_gives_step_reward_and_return(tmp_path, monkeypatch):
    written, original = [], sac.ImageDraw.ImageDraw.text

    def writing(self, position, text, **style):
        written.append(text)
        return original(self, position, text, **style)

    monkeypatch.setattr(sac.ImageDraw.ImageDraw, "text", writing)
    monkeypatch.setattr(sac, "save_video", lambda *arguments, **settings: None)
    args = sac.Args(env_id="Drawn-v0", hidden_size=8, device="cpu", compile="never")
    agent, env = sac.Agent(args, 2, 1), sac.make_env(args)
    sac.record(agent, args, tmp_path, "name")
    sac.evaluate(agent, env, 1)
    rewards = np.array([0, *env.episode["rewards"]])
    numbers = [[float(word) for word in re.findall(r"-?\d+\.?\d*", text)] for text in written]
    assert np.allclose(numbers, np.stack([np.arange(21), rewards, rewards.cumsum()], 1), atol=0.06)
    assert all(re.fullmatch(r"step \S+ +reward \S+ +return \S+", text) for text in written)


def test_evaluate_and_record_policies_of_all_three_scripts(tmp_path, capsys):
    """bc.py and dagger.py: tanh, a shared deviation, actions clipped rather than squashed."""
    actor = random_policy(tmp_path / "policy.pt", env_id="Drawn-v0")
    evaluate = ["--evaluate", str(tmp_path / "policy.pt"), "--eval-episodes", "3"]
    assert sac.main([*evaluate, "--capture-video"]) == 0
    printed, drawing = capsys.readouterr().out.splitlines()
    mean, std = map(float, re.search(r"return (\S+) \+- (\S+) over 3 episodes", printed).groups())
    returns, env = [], gym.make("Drawn-v0")
    for seed in (1000, 1001, 1002):
        obs, _ = env.reset(seed=seed)
        returns.append(0)
        truncated = False
        while not truncated:
            obs, reward, _, truncated, _ = env.step(actor(torch.from_numpy(obs)).clamp(-1, 1).detach().numpy())
            returns[-1] += reward
    assert (mean, std) == (pytest.approx(np.mean(returns), abs=0.006), pytest.approx(np.std(returns), abs=0.006))
    (video,) = (tmp_path / "videos").iterdir()
    assert drawing == f"drawing {video}"
    assert video.suffix == ".mp4" and video.stat().st_size > 1000
    assert sac.main(["--evaluate", str(tmp_path), "--eval-episodes", "1", "--max-episode-steps", "5"]) == 0


def test_a_window_shows_the_evaluation_and_needs_a_display(tmp_path, capsys, monkeypatch):
    random_policy(tmp_path / "policy.pt", env_id="Shown-v0")
    evaluate = ["--evaluate", str(tmp_path / "policy.pt"), "--eval-episodes", "2"]
    assert sac.main(evaluate) == 0
    without = capsys.readouterr().out
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(envs.Shown, "shown", 0)
    assert sac.main([*evaluate, "--render"]) == 0
    assert capsys.readouterr().out == without
    assert envs.Shown.shown == 40
    monkeypatch.delenv("DISPLAY")
    if sys.platform == "linux":
        assert sac.main([*evaluate, "--render"]) == 2
        assert "--render True" in error_line(capsys)


UNDRAWN = [("Tiny-v0", "render_mode"), ("Blind-v0", "no screen"), ("Blank-v0", "None")]


@pytest.mark.parametrize(("env_id", "names"), UNDRAWN)
def test_an_environment_that_cannot_be_drawn_is_refused_before_the_run(tmp_path, capsys, env_id, names):
    assert run(tmp_path, f"{BRIEF} --env-id {env_id} --capture-video") == 2
    assert names in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_an_environment_without_a_frame_rate_is_filmed_at_30(tmp_path):
    assert run(tmp_path, f"{BRIEF} --env-id NoRate-v0 --capture-video") == 0
    [video, *_] = (tmp_path / "run" / "videos").iterdir()
    with VideoFileClip(str(video)) as clip:
        assert clip.fps == 30


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's way")
def test_mujoco_is_drawn_without_a_display(tmp_path, capsys, monkeypatch):
    for name in ("DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    args = sac.Args(env_id="Hopper-v4", max_episode_steps=4, hidden_size=4, device="cpu", compile="never")
    agent = sac.Agent(args, 11, 3)
    sac.make_env(args)
    assert os.environ["MUJOCO_GL"] == "egl"
    try:
        sac.record(agent, args, tmp_path, "hopper")
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error}")
    with VideoFileClip(str(tmp_path / "hopper-episode-0.mp4")) as clip:
        frames = np.stack(list(clip.iter_frames()))
    assert frames.shape == (5, 480, 480, 3)
    assert frames[:, 200:].std((1, 2, 3)).min() > 20  # floor and robot


# ------------------------------------------------------------------------------------------------------ bad input

# What the rules refuse: the arguments and the settings that the line must name.
BAD_SETTINGS = {
    "--total-steps 0": "--total-steps 0",
    "--batch-size 0": "--batch-size 0",
    "--num-critics 0": "--num-critics 0",
    "--num-critic-updates 0": "--num-critic-updates 0",
    "--num-actor-samples 0": "--num-actor-samples 0",
    "--target-update-period 0": "--target-update-period 0",
    "--device cpu --compile always": "--compile always",
    "--hidden-size 0": "--hidden-size 0",
    "--num-layers 0": "--num-layers 0",
    "--eval-every 0": "--eval-every 0",
    "--eval-episodes 0": "--eval-episodes 0",
    "--log-every 0": "--log-every 0",
    "--checkpoint-every 0": "--checkpoint-every 0",
    "--capture-video --video-every 0": "--video-every 0",
    "--seed -1": "--seed -1",
    "--torch-threads -1": "--torch-threads -1",
    "--torch-threads 3000000000": "--torch-threads 3000000000",
    "--device nosuch": "--device nosuch",
    "--device meta": "--device meta",
    "--random-steps -1": "--random-steps -1",
    "--learning-starts -1": "--learning-starts -1",
    "--total-steps 100 --learning-starts 100": "--total-steps 100 --learning-starts 100",
    "--batch-size 65 --buffer-size 64": "--batch-size 65 --buffer-size 64",
    "--buffer-size -1": "--buffer-size -1",
    "--gamma 1.1": "--gamma 1.1",
    "--gamma nan": "--gamma nan",
    "--tau 0": "--tau 0",
    "--tau nan": "--tau nan",
    "--actor-lr 0": "--actor-lr 0",
    "--critic-lr inf": "--critic-lr inf",
    "--temperature-lr nan": "--temperature-lr nan",
    "--temperature -0.1": "--temperature -0.1",
    "--temperature nan": "--temperature nan",
    "--temperature inf": "--temperature inf",
    "--target-entropy nan": "--target-entropy nan",
    "--temperature 0.2 --target-entropy -3": "--temperature 0.2 --target-entropy -3.0",
    "--temperature 0.2 --temperature-lr 1e-3": "--temperature-lr 0.001 --temperature 0.2",
    "--temperature 0 --no-backup-entropy": "--temperature 0.0 --backup-entropy False",
    "--actor-std 0": "--actor-std 0.0",
    "--actor-std 7.5": "--actor-std 7.5",
    "--actor-std 2e-9": "--actor-std 2e-09",
    "--actor-std nan": "--actor-std nan",
    "--actor-std 0.1": "--temperature auto --actor-std 0.1",
    "--critic-backup double-q --num-critics 3": "--num-critics 3 --critic-backup double-q",
    "--critic-backup redq --num-critics 1": "--num-critics 1 --critic-backup redq",
    "--video-every 3": "--video-every 3 --capture-video False",
    "--render": "--render True --evaluate None",
    "--exp-name=": "--exp-name",
    "--run-dir=": "--run-dir",
    "--resume=": "--resume",
    "--evaluate=": "--evaluate",
}


def test_settings_that_break_a_rule_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sac, "train", lambda *arguments: None)  # so that what is accepted ends too
    monkeypatch.setenv("CXX", "nosuchcompiler")
    broken, wrong = set(), {}
    for arguments, named in BAD_SETTINGS.items():
        if sac.main(arguments.split()) != 2:
            wrong[arguments] = "accepted"
            continue
        line = error_line(capsys)
        broken |= {rule for rule in sac.RULES if line.endswith(" ".join(rule.split()))}
        missing = [flag for flag in re.split(r" (?=--)", named) if flag not in line]
        wrong |= {arguments: line} if missing else {}
        assert list(tmp_path.iterdir()) == []
    assert wrong == {}
    left = [rule for rule in sac.RULES if rule not in broken]
    assert all("DISPLAY" in rule or "resume and evaluate" in rule for rule in left), left


def test_settings_at_the_edges_of_the_rules_are_accepted():
    edges = ["--gamma 0", "--gamma 1", "--tau 1", "--temperature 0"]
    edges += ["--batch-size 64 --buffer-size 64", "--total-steps 2 --learning-starts 1", "--critic-backup value"]
    edges += [
        "--critic-backup redq",
        "--no-squash",
        "--no-squash --actor-std 7.3 --temperature 0.1",
        "--actor-std 3e-9 --temperature 0",
        "--random-steps 0",
    ]
    for arguments in edges:
        sac.parse_args(arguments.split())


BAD_INPUT = [
    ("--env-id HalfCheeta-v4", "HalfCheetah"),
    ("--env-id NoSuchThing-v0", "NoSuchThing"),
    ("--env-id nosuchmodule:Thing-v0", "nosuchmodule"),
    ("--env-id Broken-v0", "the simulator is not installed"),
    ("--env-id CartPole-v1", "Discrete(2)"),
    ('--env-id Space-v0 --env-kwargs {"kind":"discrete"}', "Discrete(3)"),
    ('--env-id Space-v0 --env-kwargs {"kind":"dict"}', "flat Box observations"),
    ('--env-id Space-v0 --env-kwargs {"kind":"image"}', "(8, 8, 3)"),
    ('--env-id Space-v0 --env-kwargs {"kind":"unbounded"}', "bounded Box actions"),
    ('--env-id Space-v0 --env-kwargs {"kind":"integer"}', "int64"),
    ('--env-id Space-v0 --env-kwargs {"kind":"flat"}', "bounded Box actions"),
    ("--env-id Endless-v0", "--max-episode-steps"),
    ("--env-kwargs {", "--env-kwargs"),
    ("--env-kwargs [1]", "--env-kwargs"),
    ('--env-kwargs {"nosuch":1}', "nosuch"),
    ("--max-episode-steps 0", "max_episode_steps"),
    ("--device cuda:99", "--device cuda:99"),
    ("--env-id Tiny-v0 --buffer-size 100000000000000", "--buffer-size 100000000000000"),
    ("--env-id Tiny-v0 --hidden-size 100000000", "--hidden-size 100000000"),
    ("--resume nosuchfolder", "nosuchfolder"),
    ("--evaluate nosuchfile", "nosuchfile"),
    ("--total-steps 100000 --env-id Tiny-v0 --run-dir /proc/nosuch/run", "/proc/nosuch"),
]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, names in BAD_INPUT:
        assert sac.main(arguments.split()) == 2, arguments
        assert names in error_line(capsys)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["--nosuch 1", "--total-steps 1e6", "--temperature warm", "--critic-backup max"])
def test_what_cannot_be_parsed_ends_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sac.main(arguments.split())
    assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        sac.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(sac.Args()))
    source = (ROOT / "sac_continuous.py").read_text()
    fields = re.findall(
        r"^    (\w+): [^#\n]+? = [^#\n]+(#.*)?$", source.split("class Args:")[1].split("\n# ---")[0], re.M
    )
    assert [name for name, _ in fields] == [*vars(sac.Args())]
    assert all(comment for _, comment in fields)


def test_batches_of_one_are_refused_or_work(tmp_path, capsys):
    code = run(tmp_path, f"{BRIEF} --batch-size 1")
    assert code == 0 or (code == 2 and "--batch-size 1" in error_line(capsys))


def test_an_environment_without_a_limit_runs_with_one_given(tmp_path):
    assert run(tmp_path, f"{BRIEF} --env-id Endless-v0 --max-episode-steps 15") == 0
    assert float(rows(tmp_path / "run")[0]["eval_length_mean"]) == 15


def test_an_environment_of_the_current_folder_is_found(tmp_path, monkeypatch):
    own = "import gymnasium, envs\ngymnasium.register('Mine-v0', envs.Tiny, max_episode_steps=9)\n"
    (tmp_path / "mine_in_this_folder.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    few = f"{BRIEF} --env-id mine_in_this_folder:Mine-v0"
    assert sac.main(few.split()) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine_in_this_folder_Mine-v0__sac_continuous__1__\d{8}-\d{6}", run_dir.name)
    assert json.loads((run_dir / "args.json").read_text())["env_id"] == "mine_in_this_folder:Mine-v0"
    assert float(rows(run_dir)[0]["eval_length_mean"]) == 9


def test_a_run_folder_that_is_taken_or_cannot_be_made(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "file", "file/below"):
        assert run(tmp_path, TINY, name) == 2
        assert str(tmp_path / name) in error_line(capsys)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "notes", "run"]


@pytest.mark.parametrize(
    ("bad", "at", "names", "saved"),
    [
        ("observation", 73, "(critic_loss|q_values|actor_loss|reward|return|weight_norm)", 60),
        ("reward", 73, "(critic_loss|reward|return|weight_norm)", 60),
        ("reward", 60, "(reward|return)", 0),
        ("evaluation", 70, "eval_return_mean", 60),
    ],
)
def test_nan_of_the_environment_stops_the_run_by_its_name(tmp_path, capsys, bad, at, names, saved):
    kwargs = f'{{"bad":"{bad}","bad_at":{at}}}'
    assert run(tmp_path, f"{TINY} --env-kwargs {kwargs}") == 1
    assert re.match(rf"step \d+: {names} became NaN or infinite", error_line(capsys))
    assert len(rows(tmp_path / "run")) == 1
    assert load(tmp_path / "run/policy.pt")["state_dict"]["net.0.weight"].isfinite().all()
    if saved:
        checkpoint = load(tmp_path / "run/checkpoint.pt")
        assert checkpoint["progress"][0] == saved
        assert all(value.isfinite().all() for value in checkpoint["networks"].values())
    else:
        assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("what", ["critic", "actor", "log_temperature"])
def test_no_weights_that_became_nan_are_saved(tmp_path, capsys, monkeypatch, what):
    """Spoilt by the update just before they would be saved; the losses of that step were finite."""
    original = sac.Agent.update

    def spoiling(agent, buffer, step):
        metrics = original(agent, buffer, step)
        if step == 59:
            spoilt = getattr(agent, what)
            (spoilt if what == "log_temperature" else next(spoilt.parameters())).data.fill_(torch.nan)
        return metrics

    monkeypatch.setattr(sac.Agent, "update", spoiling)
    assert run(tmp_path, f"{TINY} --log-every 1000 --eval-every 60") == 1
    assert re.match(r"step 60: \w+ became NaN or infinite", error_line(capsys))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name) == ["args.json"]


@pytest.mark.parametrize("log_every", [1, 30])  # later NaN actions have made the rewards NaN as well
def test_a_loss_that_becomes_infinite_stops_the_run(tmp_path, capsys, log_every):
    assert run(tmp_path, f"{TINY} --critic-lr 1e30 --log-every {log_every}") == 1
    assert re.match(r"step \d+: (critic_loss|q_values|actor_loss|weight_norm) became", error_line(capsys))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


NAN = {"net.0.weight": torch.full((5, 2), torch.nan), "net.0.bias": torch.zeros(5)}
NAN |= {"net.2.weight": torch.zeros(1, 5), "net.2.bias": torch.zeros(1), "log_std": torch.zeros(1)}


def test_a_policy_file_that_fits_nothing(tmp_path, capsys):
    path = tmp_path / "policy.pt"
    for changes, names in [
        ({"hidden_size": 17}, "size mismatch"),
        ({"hidden_size": "x"}, ""),
        ({"activation": "step"}, "step"),
        ({"state_dict": 7}, "policy.pt"),
        ({"state_dict": {}}, "Missing key"),
        ({"format": "policy/9"}, "format"),
        ({"env_id": "Hopper-v4"}, "other spaces than Hopper-v4 has"),
        ({"env_id": 3}, ""),
        ({"action_low": [-2.0]}, "'action_low': [-1.0]"),
        ({"action_high": [2.0]}, "'action_high': [1.0]"),
        ({"env_kwargs": '{"high":2}'}, "'action_high': [2.0]"),
    ]:
        random_policy(path, **changes)
        assert sac.main(["--evaluate", str(path)]) == 2, changes
        assert names in error_line(capsys)
    random_policy(path)
    for content in ([1, 2], {}):
        torch.save(content, path)
        assert sac.main(["--evaluate", str(path)]) == 2
        assert "policy.pt" in error_line(capsys)


def test_a_policy_of_nan_is_not_passed_off_as_a_result(tmp_path, capsys):
    random_policy(tmp_path / "policy.pt", state_dict=NAN, env_kwargs='{"strict": true}')
    assert sac.main(["--evaluate", str(tmp_path / "policy.pt")]) == 2
    assert "weights" in error_line(capsys)


def test_a_fault_of_the_environment_is_not_blamed_on_the_policy(tmp_path):
    random_policy(tmp_path / "policy.pt")
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs.Tiny, "step", lambda self, action: 1 / 0)
        sac.main(["--evaluate", str(tmp_path / "policy.pt")])


def test_evaluate_takes_no_training_settings(tmp_path, capsys):
    random_policy(tmp_path / "policy.pt")
    for more, names in (("--gamma 0.9", "gamma"), ("--hidden-size 6", "hidden_size"), ("--resume x", "")):
        assert sac.main(["--evaluate", str(tmp_path / "policy.pt"), *more.split()]) == 2
        assert names in error_line(capsys)
    assert sac.main(["--evaluate", str(tmp_path / "policy.pt"), "--render", "--capture-video"]) == 2
    assert "--render True" in error_line(capsys)


# -------------------------------------------------------------------------------------------------------- set-up


def test_importing_the_script_has_no_side_effects(tmp_path):
    code = "import os, signal; before = dict(os.environ), signal.getsignal(signal.SIGINT); "
    code += "import sac_continuous, torch; assert torch.backends.mkldnn.matmul.fp32_precision == 'none'; "
    code += "assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []
