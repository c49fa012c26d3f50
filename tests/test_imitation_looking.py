"""What shows how bc.py and dagger.py do: videos, TensorBoard, the progress bar."""

import os
from itertools import pairwise

import numpy as np
import pytest
from imitation import linear_expert, policy_of, rows, run, same_run
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bc
import dagger
import envs  # noqa: F401, registers Drawn-v0
import sac_continuous as sac

SMALL = "--batch-size 10 --hidden-size 16 --eval-episodes 2 --log-every 10 --torch-threads 1"
LENGTH = {  # four evaluations each, 20 gradient steps apart
    bc: "--train-steps 80 --eval-every 20",
    dagger: "--num-iterations 4 --train-steps-per-iteration 20 --rollout-steps 30",
}


@pytest.fixture(scope="module", params=[bc, dagger], ids=["bc", "dagger"])
def runs(request, tmp_path_factory):
    """The script, and the folder of two runs of it, of which one was filmed. And the bar of that one."""
    script, folder = request.param, tmp_path_factory.mktemp(request.param.__name__)
    expert, bar, original = linear_expert(folder / "expert.pt", [[1.0, -0.5]], "Drawn-v0"), [], script.tqdm
    arguments = f"--env-id Drawn-v0 --expert {expert} {SMALL} {LENGTH[script]}"
    assert run(script, arguments, folder / "plain") == 0

    class Bar(original):
        def set_description(self, *arguments, **options):
            bar.append((arguments[0], self.n))
            super().set_description(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "tqdm", Bar)
        assert run(script, f"{arguments} --capture-video --video-every 3", folder / "filmed") == 0
    return script, folder, bar


def events_of(run_dir):
    return EventAccumulator(str(run_dir)).Reload()


def frames_of(path):
    with VideoFileClip(str(path)) as clip:
        return np.stack(list(clip.iter_frames()))


# ------------------------------------------------------------------------------------------------------------- videos
def test_recording_changes_nothing(runs):
    _, folder, _ = runs
    assert same_run(folder / "plain", folder / "filmed")
    assert not (folder / "plain/videos").exists()
    assert events_of(folder / "plain").Tags()["images"] == []


def test_videos_of_each_third_evaluation_and_the_last(runs):
    _, folder, _ = runs
    videos = sorted((folder / "filmed/videos").iterdir())
    assert [path.name for path in videos] == ["step60-episode-0.mp4", "step80-episode-0.mp4"]
    frames = frames_of(videos[0])
    assert frames.shape == (21, 120, 240, 3)  # the first observation and 20 steps
    assert frames.mean((1, 2, 3)) == pytest.approx(40 + 5 * np.arange(21), abs=4)
    [first, last] = events_of(folder / "filmed").Images("evaluation/video")
    assert (first.step, last.step) == (60, 80)


def test_the_video_shows_the_first_evaluation_episode(runs, tmp_path, monkeypatch):
    script, folder, _ = runs
    args = script.Args(env_id="Drawn-v0")
    actor = script.load_policy(folder / "plain", args, script.make_env(args))
    drawn, original = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *arguments: drawn.append(original(*arguments)) or drawn[-1])
    videos = []

    class Writer:
        def add_video(self, tag, video, step, fps):
            videos.append((tag, video, step))

    script.record(actor, args, tmp_path, "name", Writer(), 7)
    [episode] = drawn
    assert episode["rewards"].sum() == pytest.approx(script.evaluate(actor, script.make_env(args), 1)["return_mean"])
    assert [path.name for path in tmp_path.iterdir()] == ["name-episode-0.mp4"]
    [(tag, video, step)] = videos
    assert (tag, step, video.shape) == ("evaluation/video", 7, (1, 6, 3, 60, 120))  # frames 0, 4, ... 20 at half size
    assert video.mean((0, 2, 3, 4)) == pytest.approx(40 + 5 * np.arange(0, 21, 4))


def test_sac_films_their_policies(runs, capsys):
    script, folder, _ = runs
    command = f"--evaluate {folder / 'plain'} --eval-episodes 2 --capture-video"
    assert sac.main(command.split()) == 0
    mean = float(rows(folder / "plain")[-1]["eval_return_mean"])
    assert f"Drawn-v0: return {mean:.2f} +- " in capsys.readouterr().out
    assert len(frames_of(folder / "plain/videos/evaluate-episode-0.mp4")) == 21
    assert policy_of(folder / "plain")["algorithm"] == script.__name__
    (folder / "plain/videos/evaluate-episode-0.mp4").unlink()
    (folder / "plain/videos").rmdir()


def test_mujoco_is_drawn_without_a_display(tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    args = bc.Args(env_id="Hopper-v4", max_episode_steps=4)
    env = bc.make_env(args, "rgb_array_list")
    assert os.environ["MUJOCO_GL"] == "egl"
    try:
        env.reset(seed=0)
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error}")
    for _ in range(4):
        env.step(np.zeros(3, np.float32))
    frames = np.stack(env.render())
    assert frames.shape == (5, 480, 480, 3)
    assert frames[:, 200:].std((1, 2, 3)).min() > 20  # floor and robot


# ------------------------------------------------------------------------------------------------ TensorBoard and bar
def test_tensorboard_has_every_row(runs):
    _, folder, _ = runs
    events, table = events_of(folder / "plain"), rows(folder / "plain")
    for name in table[0]:
        points = events.Scalars(f"evaluation/{name}")
        expected = [(int(row["step"]), float(row[name])) for row in table if row[name] != "nan"]
        assert [point.step for point in points] == [step for step, _ in expected]
        assert [point.value for point in points] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert {point.step for point in events.Scalars("learning/loss")} == {*range(10, 81, 10)}
    assert {point.step for point in events.Scalars("learning/weight_norm")} >= {20, 40, 60, 80}


def test_the_bar_says_what_goes_on(runs):
    script, _, bar = runs
    changes = [bar[0], *(b for a, b in pairwise(bar) if a[0] != b[0])]
    if script is dagger:
        parts = (("rolling out", 0), ("training", 0), ("evaluating", 20))
        expected = [(name, first + n) for first in range(0, 80, 20) for name, n in parts]
        assert [change for change in changes if change[0] != "recording"] == expected
    else:
        assert [name for name, _ in changes[:3]] == ["training", "evaluating", "training"]
        assert [n for name, n in changes if name == "evaluating"] == [20, 40, 60, 80]
    assert [n for name, n in changes if name == "recording"] == [60, 80]
