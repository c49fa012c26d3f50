"""What shows how bc.py and dagger.py do: videos, windows, TensorBoard, and the distance from the demonstrations."""

import io
import os
import re
import shutil
import time
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from imitation import demonstrations, hparams_table, linear_expert, rows, same_run, stop_at_gradient_step
from moviepy import VideoFileClip
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bc
import dagger
import envs

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("script", [bc, dagger], ids=["bc", "dagger"])
SMALL = "--batch-size 10 --hidden-size 16 --eval-episodes 2 --log-every 10 --torch-threads 1"
LENGTH = {  # four evaluations each, 20 gradient steps apart
    bc: "--train-steps 80 --eval-every 20",
    dagger: "--num-iterations 4 --train-steps-per-iteration 20 --rollout-steps 30",
}


def run(script, tmp_path, arguments="", name="run", env_id="envs:Drawn-v0"):
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, -0.5]], env_id)
    common = f"--env-id {env_id} --expert {expert} {SMALL} {LENGTH[script]}"
    return script.main([*f"{common} {arguments}".split(), "--run-dir", str(tmp_path / name)])


def events_of(run_dir):
    return EventAccumulator(str(run_dir)).Reload()


# --------------------------------------------------------------------------------------------------------- videos


@BOTH
def test_recording_changes_nothing_and_makes_videos(script, tmp_path):
    assert run(script, tmp_path, name="plain") == 0
    assert run(script, tmp_path, "--capture-video --video-every 3 --video-episodes 2", "filmed") == 0
    assert same_run(tmp_path / "plain", tmp_path / "filmed")
    assert (tmp_path / "plain/policy.pt").read_bytes() == (tmp_path / "filmed/policy.pt").read_bytes()
    assert not (tmp_path / "plain/videos").exists()

    videos = sorted((tmp_path / "filmed/videos").iterdir())
    assert [path.name for path in videos] == [f"step{step}-{i}-episode-0.mp4" for step in (60, 80) for i in (0, 1)]
    with VideoFileClip(str(videos[0])) as clip:
        frames = np.stack(list(clip.iter_frames()))
    assert frames.shape == (21, 120, 240, 3)  # the first observation and 20 steps
    background = frames[:, 60:].mean((1, 2, 3))
    assert background == pytest.approx(40 + 5 * np.arange(21), abs=4)
    assert all(frame[:30].max() > 230 for frame in frames)  # white text on grey
    events = events_of(tmp_path / "filmed")
    assert [event.step for event in events.Images("evaluation/video")] == [60, 80]
    assert events_of(tmp_path / "plain").Tags()["images"] == []


@BOTH
def test_the_videos_show_the_first_evaluation_episodes(script, tmp_path, monkeypatch):
    original, drawn, evaluated = script.evaluate, [], []

    def spying(actor, envs, noise=None, first=0):
        result = original(actor, envs, noise, first)
        if noise is None:
            (drawn if envs[0].render_mode else evaluated).append(result["returns"])
        return result

    monkeypatch.setattr(script, "evaluate", spying)
    assert run(script, tmp_path, "--capture-video --video-episodes 2") == 0
    assert np.concatenate(drawn) == pytest.approx(evaluated[-1], rel=1e-5)  # a batch of one rounds otherwise


def test_tensorboard_shows_a_rollout_of_each_iteration_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, dagger, 50)
        assert run(dagger, tmp_path, "--capture-video") == 143
    assert dagger.main(["--resume", str(tmp_path / "run")]) == 0
    events = events_of(tmp_path / "run")
    assert [event.step for event in events.Images("rollout/video")] == [20, 40, 60, 80]
    assert [event.step for event in events.Images("evaluation/video")] == [80]
    for tag in ("rollout/video", "evaluation/video"):
        with Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)) as animation:
            assert (animation.n_frames, animation.size) == (6, (120, 60))  # steps 0, 4, ... 20
            for i in range(6):
                animation.seek(i)
                assert np.asarray(animation.convert("RGB"))[40:].mean() == pytest.approx(40 + 20 * i, abs=4)


def test_the_rollout_shown_is_the_first_that_the_next_iteration_collects(tmp_path, monkeypatch):
    original, drawn, collected = dagger.rollouts, {}, {}

    def spying(actor, expert, env, args, iteration):
        for episode in original(actor, expert, env, args, iteration):
            (drawn if env.render_mode else collected).setdefault(iteration, episode)
            yield episode

    monkeypatch.setattr(dagger, "rollouts", spying)
    assert run(dagger, tmp_path, "--capture-video --expert-mixing 0.5") == 0
    assert [*drawn] == [1, 2, 3, 4]
    assert [*collected] == [1, 2, 3]
    for i in collected:
        assert all(np.array_equal(drawn[i][field], collected[i][field]) for field in collected[i])


@BOTH
def test_evaluate_and_record(script, tmp_path, capsys):
    assert run(script, tmp_path) == 0
    capsys.readouterr()
    evaluate = ["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2"]
    assert script.main([*evaluate, "--capture-video", "--video-episodes", "2"]) == 0
    mean = float(rows(tmp_path / "run")[-1]["eval_return_mean"])
    assert f"return {mean:.2f} +- " in capsys.readouterr().out
    videos = sorted(path.name for path in (tmp_path / "run/videos").iterdir())
    assert videos == ["evaluate-0-episode-0.mp4", "evaluate-1-episode-0.mp4"]
    assert script.main([*evaluate, "--capture-video", "--render"]) == 2
    assert "--render True and --capture-video True contradict each other" in capsys.readouterr().err
    assert script.main([*evaluate, "--video-every", "3"]) == 2
    assert "--evaluate trains nothing and contradicts --video-every" in capsys.readouterr().err


@BOTH
def test_mujoco_is_drawn_without_a_display(script, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    path = shutil.copy(ROOT / "experts/Hopper-v4.pt", tmp_path)
    few = "--eval-episodes 1 --max-episode-steps 4"
    code = script.main(["--evaluate", str(path), "--capture-video", *few.split()])
    assert os.environ["MUJOCO_GL"] == "egl"
    if code == 2 and "MuJoCo needs OpenGL" in capsys.readouterr().err:
        pytest.skip("no OpenGL here")
    assert code == 0
    with VideoFileClip(str(tmp_path / "videos/evaluate-0-episode-0.mp4")) as clip:
        frames = np.stack(list(clip.iter_frames()))
    assert frames.shape == (5, 480, 480, 3)
    assert frames[:, 200:].std((1, 2, 3)).min() > 20  # floor and robot
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".TXT"] == []


class Blind(envs.Drawn):
    def render(self):
        raise RuntimeError("no\nscreen")


gym.register("Blind-v0", Blind, max_episode_steps=20)


@BOTH
def test_what_cannot_be_drawn_is_refused_before_the_run(script, tmp_path, capsys):
    assert run(script, tmp_path, "--capture-video", env_id="Blind-v0") == 2
    err = capsys.readouterr().err
    assert err == "error: --capture-video: Blind-v0 cannot be drawn (no screen)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["expert.pt"]


class Window(envs.Tiny):
    """Counts what it shows."""

    metadata: ClassVar = {"render_modes": ["human"], "render_fps": 100}
    shown = 0

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def step(self, action):
        Window.shown += self.render_mode == "human"
        return super().step(action)


gym.register("Window-v0", Window, max_episode_steps=20)


@BOTH
def test_a_window_shows_the_evaluation_at_its_own_speed(script, tmp_path, capsys, monkeypatch):
    policy = linear_expert(tmp_path / "policy.pt", [[1.0, -0.5]], "Window-v0")
    evaluate = ["--evaluate", policy, "--eval-episodes", "2"]
    assert script.main(evaluate) == 0
    without = capsys.readouterr().out
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(Window, "shown", 0)
    started = time.perf_counter()
    assert script.main([*evaluate, "--render"]) == 0
    assert time.perf_counter() - started > 0.4  # 40 steps of a hundredth of a second
    assert capsys.readouterr().out == without
    assert Window.shown == 40

    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert script.main([*evaluate, "--render"]) == 2
    assert re.fullmatch("error: --render: there is no display.*\n", capsys.readouterr().err)


# ----------------------------------------------------------------------------------------------------- TensorBoard


@BOTH
def test_settings_and_returns_stand_in_the_hparams_tab(script, tmp_path, monkeypatch):
    runs = {"a": "--seed 1", "b": "--seed 2 --learning-rate 1e-3 --max-episode-steps 10 --loss mse"}
    for name, arguments in runs.items():
        assert run(script, tmp_path, arguments, f"runs/{name}") == 0
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, script, 50)
        assert run(script, tmp_path, "--seed 3", "runs/c") == 143
    assert script.main(["--resume", str(tmp_path / "runs/c")]) == 0
    assert not [path for path in (tmp_path / "runs").glob("*/*") if path.is_dir()]  # no folder of add_hparams

    types, metrics, table = hparams_table(tmp_path / "runs")
    assert metrics == ["evaluation/eval_return_mean"]
    assert {types[name] for name in ("seed", "learning_rate")} == {"DATA_TYPE_FLOAT64"}
    assert {types[name] for name in ("env_id", "loss", "capture_video", "max_episode_steps")} == {"DATA_TYPE_STRING"}
    assert [*table] == ["a", "b", "c"]
    wanted = {"seed": [1, 2, 3], "learning_rate": [5e-3, 1e-3, 5e-3], "loss": ["nll", "mse", "nll"]}
    wanted |= {"max_episode_steps": ["None", "10", "None"], "capture_video": ["False"] * 3}
    for name, values in wanted.items():
        assert [settings[name] for settings, _ in table.values()] == values
    for name, (_, metric) in table.items():
        last = float(rows(tmp_path / "runs" / name)[-1]["eval_return_mean"])
        assert metric == (pytest.approx(last, rel=1e-5), 80)
    assert [*hparams_table(tmp_path / "runs/c")[2]] == ["."]  # the folder of one run


@BOTH
def test_tensorboard_has_every_row_once_after_a_resume(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, script, {bc: 40, dagger: 41}[script])  # both go on from step 40
        assert run(script, tmp_path) == 143
    assert script.main(["--resume", str(tmp_path / "run"), "--capture-video"]) == 0
    events, table = events_of(tmp_path / "run"), rows(tmp_path / "run")
    tags = ["eval_return_mean", "eval_sampled_return_mean", "train_loss", "distance_from_demonstrations"]
    for tag in tags + ["validation_loss"] * (script is bc):
        points = events.Scalars(f"evaluation/{tag}")
        assert [point.step for point in points] == [int(row["step"]) for row in table] == [20, 40, 60, 80]
        assert [point.value for point in points] == pytest.approx([float(row[tag]) for row in table], rel=1e-5)
    assert [point.step for point in events.Scalars("learning/loss")] == [*range(10, 81, 10)]


# ------------------------------------------------------------------------------ distance from the demonstrations


@BOTH
def test_distance_from_demonstrations_by_hand(script):
    random = np.random.default_rng(0)
    demonstrated = random.normal(size=(50, 3)) * [1.0, 100.0, 1e-3] + [0.0, 30.0, 5.0]
    demonstrated[:, 2] = 5.0  # never varies
    episodes = [random.normal(size=(length, 3)) * [2.0, 300.0, 1.0] for length in (1, 7, 2345)]
    expected = []
    for episode in episodes:
        apart = (episode[:, None] - demonstrated) / [demonstrated[:, 0].std(), demonstrated[:, 1].std(), 1.0]
        expected.append(np.sqrt((apart**2).sum(2)).min(1).mean())
    as_float = torch.from_numpy(demonstrated).float()
    distances = script.distance_from_demonstrations([episode.astype(np.float32) for episode in episodes], as_float)
    assert distances == pytest.approx(np.array(expected), rel=1e-4)
    itself = script.distance_from_demonstrations([as_float.numpy()], as_float)
    assert itself == pytest.approx(0, abs=2e-3)  # float32


@BOTH
def test_a_few_thousand_states_stand_for_all(script):
    obs = np.arange(6000, dtype=np.float32).reshape(3000, 2)
    assert torch.equal(script.some_of(obs, 3000), torch.from_numpy(obs))
    assert script.some_of(obs, 2999)[:, 0].tolist() == [*range(0, 6000, 4)]
    assert len(script.some_of(obs)) == 1500
    assert script.some_of(obs[:1]).shape == (1, 2)


@BOTH
def test_a_row_has_the_distance_of_the_mean_actions_episodes(script, tmp_path):
    data = tmp_path / "data.npz"
    np.savez(data, **demonstrations(), env_id=np.array("envs:Tiny-v0"))
    assert run(script, tmp_path, f"--expert-data {data}", env_id="envs:Tiny-v0") == 0
    actor = script.load_policy(str(tmp_path / "run"))["actor"]
    args = script.Args(env_id="envs:Tiny-v0")
    episodes = script.evaluate(actor, [script.make_env(args) for _ in range(2)])["observations"]
    assert [len(episode) for episode in episodes] == [20, 20]
    expected = demonstrations()["observations"]
    apart = (np.concatenate(episodes)[:, None] - expected) / expected.std(0)
    last = rows(tmp_path / "run")[-1]
    assert [*last][-1] == "distance_from_demonstrations"
    distance = np.sqrt((apart**2).sum(2)).min(1).mean()
    assert float(last["distance_from_demonstrations"]) == pytest.approx(distance, rel=1e-3)
