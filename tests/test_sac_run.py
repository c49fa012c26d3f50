"""sac_continuous.py from command line to run folder, good and bad input."""

import ast
import csv
import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from imitation import hparams_table
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import sac_continuous as sac

ROOT = Path(__file__).parent.parent
SMALL = "--total-steps 120 --learning-starts 40 --random-steps 40 --batch-size 16 --hidden-size 16 --torch-threads 1"
SMALL += " --compile never --eval-every 50 --eval-episodes 2 --checkpoint-every 60 --log-every 10"


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


def same_policy(a, b):
    a, b = (torch.load(x / "policy.pt", weights_only=True)["state_dict"] for x in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------- the run folder


def test_a_run_as_a_process(tmp_path):
    process = start(f"--env-id HalfCheetah-v4 --temperature 0.2 {SMALL}", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "step" not in line] == []
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v4__sac_continuous__1__\d{8}-\d{6}", run_dir.name)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]  # no MUJOCO_LOG.TXT
    assert f"--evaluate runs/{run_dir.name}" in out
    assert f"tensorboard --logdir runs/{run_dir.name}" in out

    assert [row["step"] for row in rows(run_dir)] == ["50", "100", "120"]
    columns = "step wall_time_s eval_return_mean eval_return_std eval_length_mean train_return_mean train_length_mean"
    columns += " episodes critic_loss actor_loss q_values entropy temperature eval_q_mean eval_discounted_return_mean"
    assert list(rows(run_dir)[0]) == [*columns.split(), "steps_per_s"]
    settings = json.loads((run_dir / "args.json").read_text())
    assert settings["temperature"] == 0.2
    assert settings["seed"] == 1
    assert settings["versions"]["torch"].startswith("2.")
    assert list(run_dir.glob("events.out.tfevents.*"))

    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert (policy["format"], policy["algorithm"], policy["env_id"]) == ("policy/1", "sac", "HalfCheetah-v4")
    assert (policy["obs_dim"], policy["action_dim"], policy["action_low"]) == (17, 6, [-1.0] * 6)

    for path in (run_dir, run_dir / "policy.pt"):
        process = start(f"--evaluate {path} --eval-episodes 2", tmp_path)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        mean, std = re.search(r"return (\S+) \+- (\S+) over 2 episodes", out).groups()
        assert float(mean) == pytest.approx(float(rows(run_dir)[-1]["eval_return_mean"]), abs=0.01)
        assert float(std) == pytest.approx(float(rows(run_dir)[-1]["eval_return_std"]), abs=0.01)


def test_policy_file_of_the_default_network_is_under_a_megabyte(tmp_path):
    args = sac.Args()
    sac.save_policy(sac.Actor(17, 6), args, sac.make_env(args), tmp_path / "policy.pt")
    assert (tmp_path / "policy.pt").stat().st_size < 1_000_000


def test_same_seed_same_bytes_and_evaluating_changes_nothing(tmp_path):
    tiny = f"--env-id envs:Tiny-v0 {SMALL}"
    run(tmp_path, tiny, "a")
    run(tmp_path, tiny, "b")
    run(tmp_path, f"{tiny} --seed 2", "c")
    run(tmp_path, f"{tiny} --eval-every 7 --eval-episodes 5 --log-every 3 --checkpoint-every 11", "d")
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert same_policy(tmp_path / "a", tmp_path / "b")
    assert not same_policy(tmp_path / "a", tmp_path / "c")
    assert same_policy(tmp_path / "a", tmp_path / "d")


def test_evaluation_starts_from_the_same_states_and_reports_what_happened():
    args = sac.Args(env_id="envs:Tiny-v0")
    actor = sac.Actor(2, 1, hidden_size=8)
    eval_envs = [sac.make_env(args) for _ in range(3)]
    first, second = (sac.evaluate(actor, eval_envs, gamma=0.9) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len({tuple(obs) for obs in first["first_obs"]}) == 3

    env, rewards = sac.make_env(args), []  # the last of the three again, by hand
    obs, _ = env.reset(seed=sac.EVALUATION_SEED + 2)
    for _ in range(20):
        with torch.no_grad():
            obs, reward, *_ = env.step(actor.mean_action(torch.from_numpy(obs)[None]).numpy()[0])
        rewards.append(reward)
    assert first["returns"][2] == pytest.approx(sum(rewards), rel=1e-5)
    assert first["lengths"].tolist() == [20, 20, 20]
    assert first["discounted_returns"][2] == pytest.approx(sum(0.9**t * r for t, r in enumerate(rewards)), rel=1e-5)


def test_truncated_transitions_bootstrap_and_terminated_ones_do_not(tmp_path):
    run(tmp_path, f"--env-id envs:Tiny-v0 {SMALL}", "truncated")
    kwargs = '{"length":10}'
    run(tmp_path, f"--env-id envs:Tiny-v0 --env-kwargs {kwargs} {SMALL}", "terminated")
    flags = {}
    for name in ("truncated", "terminated"):
        checkpoint = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        stored = checkpoint["buffer"]["rows"]
        flags[name] = stored[:, -1].nonzero().flatten().tolist()
        # next_obs is the episode's own last observation, not the next episode's first
        ends = range(19, 119, 20) if name == "truncated" else range(9, 119, 10)
        assert all(not torch.equal(stored[i, 4:6], stored[i + 1, 0:2]) for i in ends)
        assert torch.equal(stored[0, 4:6], stored[1, 0:2])
    assert flags == {"truncated": [], "terminated": list(range(9, 120, 10))}


@pytest.mark.parametrize("squash", [True, False])
def test_actions_reach_the_environments_own_bounds_and_no_further(squash):
    args = sac.Args(env_id="envs:Tiny-v0", env_kwargs='{"low": -3, "high": 1, "action_dim": 2}', squash=squash)
    env = sac.make_env(args)
    env.reset(seed=0)
    for action in ([-1.0, 1.0], [0.0, 0.5]):
        env.step(np.array(action, np.float32))
    received = env.unwrapped.actions
    assert np.allclose(received, [[-3, 1], [-1, 0]])
    if not squash:
        env.step(np.array([-7, 7], np.float32))
        assert np.allclose(env.unwrapped.actions[-1], [-3, 1])


def test_random_steps_are_uniform_over_the_box():
    agent = sac.Agent(sac.Args(squash=False), 2, 3, torch.device("cpu"))
    actions = np.stack([agent.random_action() for _ in range(4000)])
    assert actions.shape == (4000, 3)
    assert actions.min() >= -1
    assert actions.max() <= 1
    assert np.allclose(actions.mean(0), 0, atol=0.05)
    assert np.allclose(actions.var(0), 1 / 3, atol=0.03)


VARIANTS = [
    "--actor-gradient reinforce --num-actor-samples 3",
    "--num-critics 1 --critic-backup mean --temperature 0.1 --tau 1 --target-update-period 5",
    "--critic-backup double-q --lr-schedule linear",
    "--num-critics 4 --critic-backup redq --num-critic-updates 3",
    "--critic-backup value --temperature 0.2 --actor-std shared",
    "--no-squash --actor-std 0.1 --temperature 0 --activation silu --num-layers 1",
    "--no-squash --temperature 0.1 --no-backup-entropy --activation leaky-relu --num-actor-samples 2",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_its_policy_file_rebuilds_it(tmp_path, variant, capsys):
    assert run(tmp_path, f"--env-id envs:Tiny-v0 {SMALL} {variant}") == 0
    assert all(np.isfinite(float(row["critic_loss"])) for row in rows(tmp_path / "run")[1:])
    assert sac.main(["--evaluate", str(tmp_path / "run"), "--eval-episodes", "2"]) == 0
    mean = float(re.search(r"return (\S+) \+-", capsys.readouterr().out.splitlines()[-1]).group(1))
    assert mean == pytest.approx(float(rows(tmp_path / "run")[-1]["eval_return_mean"]), abs=0.01)


# ------------------------------------------------------------------------------------------------------ bad input

BAD_INPUT = [
    ("--env-id HalfCheeta-v4", "HalfCheetah-v4"),
    ("--env-id NoSuchThing-v0", "no such environment"),
    ("--env-id nosuchmodule:Thing-v0", "nosuchmodule"),
    ("--env-id envs:Broken-v0", "the simulator is not installed"),
    ("--env-id CartPole-v1", "Discrete(2)"),
    ('--env-id envs:Space-v0 --env-kwargs {"kind":"discrete"}', "Discrete(3)"),
    ('--env-id envs:Space-v0 --env-kwargs {"kind":"dict"}', "flat Box observations"),
    ('--env-id envs:Space-v0 --env-kwargs {"kind":"image"}', "(8, 8, 3)"),
    ('--env-id envs:Space-v0 --env-kwargs {"kind":"unbounded"}', "bounded Box actions"),
    ("--env-kwargs {", "--env-kwargs"),
    ("--env-kwargs [1]", "--env-kwargs"),
    ('--env-kwargs {"nosuch":1}', "nosuch"),
    ("--device nosuch", "--device nosuch"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device meta", "--device meta"),
    ("--total-steps 0", "--total-steps 0"),
    ("--batch-size 0", "--batch-size 0"),
    ("--buffer-size -1", "--buffer-size -1"),
    ("--gamma 1.1", "--gamma 1.1"),
    ("--gamma nan", "--gamma nan"),
    ("--tau 0", "--tau 0"),
    ("--tau nan", "--tau nan"),
    ("--actor-lr 0", "--actor-lr 0"),
    ("--critic-lr inf", "--critic-lr inf"),
    ("--hidden-size 0", "--hidden-size 0"),
    ("--num-layers 0", "--num-layers 0"),
    ("--eval-every 0", "--eval-every 0"),
    ("--eval-episodes 0", "--eval-episodes 0"),
    ("--seed -1", "--seed -1"),
    ("--temperature -0.1", "--temperature -0.1"),
    ("--temperature nan", "--temperature nan"),
    ("--target-entropy nan", "--target-entropy nan"),
    ("--actor-std 0", "--actor-std 0"),
    ("--max-episode-steps 0", "--max-episode-steps 0"),
    ("--buffer-size 100000000000000", "--buffer-size 100000000000000"),
    ("--hidden-size 100000000", "--hidden-size 100000000"),
    ("--torch-threads 3000000000", "--torch-threads 3000000000"),
    ("--exp-name=", "--exp-name is empty"),
    ("--resume=", "--resume"),
    ("--evaluate=", "--evaluate"),
    ("--total-steps 100 --learning-starts 100", "--learning-starts 100 and --total-steps 100"),
    ("--batch-size 65 --buffer-size 64", "--batch-size 65 and --buffer-size 64"),
    ("--temperature 0.2 --target-entropy -3", "--target-entropy -3.0 and --temperature 0.2"),
    ("--temperature 0.2 --temperature-lr 1e-3", "--temperature-lr 0.001 and --temperature 0.2"),
    ("--temperature 0 --no-backup-entropy", "--backup-entropy False and --temperature 0.0"),
    ("--no-squash --actor-std 0.1", "--actor-std 0.1 and --temperature auto"),
    ("--critic-backup double-q --num-critics 3", "--critic-backup double-q and --num-critics 3"),
    ("--critic-backup redq --num-critics 1", "--critic-backup redq and --num-critics 1"),
    ("--video-every 3", "--video-every 3 and --capture-video False"),
    ("--video-episodes 3", "--video-episodes 3 and --capture-video False"),
    ("--render", "--render True and --evaluate None"),
    ("--matmul-precision tf32 --device cpu", "--matmul-precision tf32"),
    ("--resume nosuchfolder", "nosuchfolder"),
    ("--evaluate nosuchfile", "nosuchfile"),
    ("--evaluate nosuchfile --resume nosuchfolder", "--resume and --evaluate"),
]


def test_a_gpu_is_known_by_its_number(monkeypatch):
    class OnGpu:
        device = torch.device("cuda:0")

    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: OnGpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    assert str(sac.set_up_torch(sac.Args(device="cuda"))) == "cuda:0"
    assert chosen == [0]


@pytest.mark.parametrize(("arguments", "names"), BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, names):
    monkeypatch.chdir(tmp_path)
    assert sac.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert names in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["--nosuch 1", "--total-steps 1e6", "--temperature warm", "--critic-backup max"])
def test_what_cannot_be_parsed_ends_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sac.main(arguments.split())
    assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_bad_input_as_a_process(tmp_path):
    process = start("--env-id CartPole-v1", tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_taken_or_cannot_be_made(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path, SMALL) == 2
    assert "--resume" in capsys.readouterr().err
    for name in ("file", "file/below"):
        assert run(tmp_path, SMALL, name) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sac.main([*SMALL.split(), "--run-dir", "/proc/nosuch/run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "notes", "run"]


@pytest.mark.parametrize("bad", ["observation", "reward"])
def test_an_environment_that_returns_nan_stops_the_run(tmp_path, capsys, bad):
    kwargs = f'{{"bad":"{bad}","bad_at":101}}'
    assert run(tmp_path, f"--env-id envs:Tiny-v0 --env-kwargs {kwargs} {SMALL}") == 1
    err = capsys.readouterr().err
    assert re.search(rf"stopped at step 100: {bad} became NaN or infinite; .*{tmp_path / 'run'}", err)
    assert len(rows(tmp_path / "run")) == 2
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 60


def test_a_loss_that_becomes_infinite_stops_the_run(tmp_path, capsys):
    arguments = f"--env-id envs:Tiny-v0 {SMALL} --critic-lr 1e30"
    assert run(tmp_path, arguments) == 1
    assert re.search(r"stopped at step \d+: (critic_loss|q_values|actor_loss) became", capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda policy: policy.update(hidden_size=17), "no policy can be built"),
        (lambda policy: policy.update(activation="step"), "no policy can be built"),
        (lambda policy: policy.pop("state_dict"), "no policy can be built"),
        (lambda policy: policy.pop("env_id"), "no policy can be built"),
        (lambda policy: policy.update(state_dict=7), "no policy can be built"),
        (lambda policy: policy["state_dict"]["net.0.weight"].fill_(torch.nan), "not finite"),
        (lambda policy: policy.update(format="policy/9"), "policy/9"),
        (lambda policy: policy.update(env_id="Hopper-v4", env_kwargs="{}", max_episode_steps=None), "obs_dim"),
        (lambda policy: policy.update(env_id=3), "--env-id 3"),
    ],
)
def test_a_policy_file_that_fits_nothing(tmp_path, capsys, spoil, names):
    args = sac.Args(env_id="envs:Tiny-v0", hidden_size=16)
    path = tmp_path / "policy.pt"
    sac.save_policy(sac.Actor(2, 1, hidden_size=16), args, sac.make_env(args), path)
    policy = torch.load(path, weights_only=True)
    spoil(policy)
    torch.save(policy, path)
    assert sac.main(["--evaluate", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert names in err


def test_evaluate_takes_no_training_settings(tmp_path, capsys):
    args = sac.Args(env_id="envs:Tiny-v0", hidden_size=16)
    path = tmp_path / "policy.pt"
    sac.save_policy(sac.Actor(2, 1, hidden_size=16), args, sac.make_env(args), path)
    assert sac.main(["--evaluate", str(path), "--gamma", "0.9"]) == 2
    assert "--gamma" in capsys.readouterr().err


def test_ctrl_c_ends_cleanly_with_everything_written(tmp_path):
    arguments = f"--env-id envs:Tiny-v0 {SMALL} --total-steps 1000000 --run-dir run"
    process = start(arguments, tmp_path)
    progress = tmp_path / "run" / "progress.csv"
    deadline = time.time() + 60
    while not (progress.exists() and progress.stat().st_size > 1000):
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "--resume run" in out
    step = int(re.search(r"stopped at step (\d+)", out).group(1))
    assert step - 50 < int(rows(tmp_path / "run")[-1]["step"]) <= step
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == step


# ------------------------------------------------------------------------------------------------------- learning


def test_pendulum_is_learned(tmp_path):
    settings = "--total-steps 8000 --random-steps 1000 --learning-starts 1000 --batch-size 128 --hidden-size 128"
    assert run(tmp_path, f"--env-id Pendulum-v1 {settings} --eval-every 1000 --torch-threads 1") == 0
    returns = [float(row["eval_return_mean"]) for row in rows(tmp_path / "run")]
    assert returns[0] < -800
    assert max(returns[1:]) > -250
    assert float(rows(tmp_path / "run")[-1]["train_return_mean"]) > -250


# -------------------------------------------------------------------------------------------------------- set-up


@pytest.mark.parametrize("script", [path.name for path in ROOT.glob("*.py")])
def test_inline_metadata_has_the_pins_of_requirements_txt(script):
    text = (ROOT / script).read_text()
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    pins = set((ROOT / "requirements.txt").read_text().split())
    assert metadata["requires-python"] == ">=3.11"
    assert set(metadata["dependencies"]) <= pins
    packages = {pin.split("==")[0].split("[")[0]: pin for pin in pins}
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", "") for node in imports
    }
    imported = {module.split(".")[0].replace("PIL", "pillow") for module in modules} & packages.keys()
    assert len(imported) > 5
    assert {packages[name] for name in imported - {"minari"}} <= set(metadata["dependencies"])


def test_importing_the_script_has_no_side_effects(tmp_path):
    code = "import sys; before = set(sys.argv); import sac_continuous, signal, torch; "
    code += "assert torch.backends.mkldnn.matmul.fp32_precision == 'none'; "
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


assert envs  # registers the environments in this process


# --------------------------------------------------------------------------------------------------------- videos


def test_recording_changes_nothing_and_makes_videos(tmp_path, capsys):
    arguments = f"--env-id envs:Drawn-v0 {SMALL}"
    assert run(tmp_path, arguments, "plain") == 0
    assert run(tmp_path, f"{arguments} --capture-video --video-every 2 --video-episodes 2", "filmed") == 0
    assert same_policy(tmp_path / "plain", tmp_path / "filmed")
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "filmed")
    videos = sorted(path.name for path in (tmp_path / "filmed" / "videos").iterdir())
    assert videos == [f"step{step}-{i}-episode-0.mp4" for step in (100, 120) for i in (0, 1)]
    with VideoFileClip(str(tmp_path / "filmed" / "videos" / videos[0])) as clip:
        assert clip.n_frames == 21
    events = EventAccumulator(str(tmp_path / "filmed")).Reload()
    assert [event.step for event in events.Images("evaluation/video")] == [100, 120]

    assert sac.main(["--evaluate", str(tmp_path / "plain"), "--eval-episodes", "1", "--capture-video"]) == 0
    assert (tmp_path / "plain" / "videos" / "evaluate-0-episode-0.mp4").stat().st_size > 1000


def test_tensorboard_has_what_the_readme_explains_and_the_settings(tmp_path):
    assert run(tmp_path, f"--env-id envs:Drawn-v0 {SMALL} --tau 0.01") == 0
    tags = EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"]
    table = (ROOT / "README.md").read_text().split("## When it does not learn")[1].split("A healthy run on")[0]
    explained = []
    for first_column in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", first_column)
        group = names[0].split("/")[0]
        explained += [name if "/" in name else f"{group}/{name}" for name in names]
    assert len(explained) >= 12
    for pattern in explained:
        assert fnmatch.filter(tags, pattern), pattern
    types, metrics, table = hparams_table(tmp_path)
    [(settings, (last_return, step))] = table.values()
    assert settings["tau"] == 0.01 and settings["temperature"] == "auto" and types["tau"] == "DATA_TYPE_FLOAT64"
    assert metrics == ["evaluation/eval_return_mean"] and step == 120
    assert last_return == pytest.approx(float(rows(tmp_path / "run")[-1]["eval_return_mean"]), rel=1e-6)


def test_each_frame_carries_step_reward_and_return():
    class Still(gym.Env):
        observation_space = action_space = envs.BOX

        def reset(self, **kwargs):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.5, False, False, {}

        def render(self):
            return np.zeros((100, 480, 3), np.uint8)

    env = sac.FrameText(Still())
    env.reset()
    before = env.render()
    env.step(None)
    after = env.render()
    assert before[:40].max() == 255  # white on black, at the top
    assert before[40:].max() == 0
    assert (before != after).any()
    assert (env.steps, env.reward, env.episode_return) == (1, 1.5, 1.5)


def test_an_environment_that_cannot_be_drawn(tmp_path, capsys):
    assert run(tmp_path, f"--env-id envs:Tiny-v0 {SMALL} --capture-video") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_window_needs_a_display(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    run(tmp_path, f"--env-id envs:Drawn-v0 {SMALL}")
    capsys.readouterr()
    assert sac.main(["--evaluate", str(tmp_path / "run"), "--render"]) == 2
    assert re.fullmatch("error: --render: there is no display.*\n", capsys.readouterr().err)
