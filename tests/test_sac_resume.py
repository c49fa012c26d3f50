"""sac_continuous.py stopped, broken and resumed."""

import json
import os
import pickle
import resource
import sys
import zipfile

import pytest
import torch
from fault_campaign import campaign, differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sac_run import SMALL, TINY, error_line, load, random_policy, rows, run, same_policy, untimed

import sac_continuous as sac

LONG = f"{TINY} --buffer-size 70 --checkpoint-every 11"


def stopped_run(monkeypatch, step, start):
    """What `start` starts, ended as by SIGKILL when its step `step` (from 0) is to be stored: nothing is saved."""
    original = sac.ReplayBuffer.add

    def add(buffer, *row):
        if buffer.num_added == step:
            raise KeyboardInterrupt
        original(buffer, *row)

    with monkeypatch.context() as patch:
        patch.setattr(sac.ReplayBuffer, "add", add)
        assert start() == 130


def resume(tmp_path, name="stopped", *more):
    return sac.main(["--resume", str(tmp_path / name), *more])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """LONG, never stopped. Nothing may write into its folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, LONG, "whole") == 0
    return folder / "whole"


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """LONG, stopped at step 90: the last checkpoint is of step 88."""
    stopped_run(monkeypatch, 90, lambda: run(tmp_path, LONG, "stopped"))
    return tmp_path / "stopped"


VARIANTS = [
    "--lr-schedule linear --critic-backup value --temperature 0.1",
    "--critic-backup redq --num-critics 3 --num-critic-updates 2 --target-update-period 3 --actor-gradient reinforce",
    "--critic-backup double-q --actor-std shared --no-squash --lr-schedule linear",
    '--env-kwargs {"samples":true,"noise":"own","length":7}',
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_anywhere_and_resumed_is_the_run_that_never_stopped(tmp_path, monkeypatch, variant):
    """Stopped in the random steps, before and after the buffer is full, one step after a checkpoint, and at the end."""
    run(tmp_path, f"{LONG} {variant}", "whole")
    stopped_run(monkeypatch, 12, lambda: run(tmp_path, f"{LONG} {variant}", "stopped"))
    for step in (50, 67, 119):
        before = load(tmp_path / "stopped/checkpoint.pt")["progress"][0]
        stopped_run(monkeypatch, step, lambda: resume(tmp_path))
        assert before < load(tmp_path / "stopped/checkpoint.pt")["progress"][0] == step // 11 * 11
    assert resume(tmp_path) == 0
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def test_tensorboard_goes_on_where_the_checkpoint_was(stopped, whole, tmp_path):
    """The points of the steps 80 to 88 were written, and are written again."""
    assert resume(tmp_path) == 0
    assert differences(stopped, whole) == []
    points = {}
    for folder in (whole, stopped):
        events = EventAccumulator(str(folder)).Reload()
        points[folder] = [(event.step, event.value) for event in events.Scalars("learning/critic_loss")]
    assert points[whole] == points[stopped]
    assert [step for step, _ in points[whole]] == [44, 50, 55, 60, 66, 70, 77, 80, 88, 90, 99, 100, 110, 120]


def test_a_simulator_is_rebuilt_in_the_middle_of_an_episode(tmp_path, monkeypatch):
    arguments = f"--env-id Ant-v4 {SMALL} --buffer-size 200 --total-steps 70 --max-episode-steps 50"
    run(tmp_path, arguments, "whole")
    stopped_run(monkeypatch, 65, lambda: run(tmp_path, arguments, "stopped"))
    assert resume(tmp_path) == 0
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def test_every_episode_has_a_seed_of_its_own_that_follows_from_the_first():
    starts = {}
    for seed in (1, 1, 2):
        env = sac.make_env(sac.Args(env_id="Tiny-v0"))
        observations = [env.reset(seed=seed)[0], *(env.reset()[0] for _ in range(20))]
        assert starts.setdefault(seed, [obs.tolist() for obs in observations]) == [obs.tolist() for obs in observations]
    assert len({tuple(obs) for observations in starts.values() for obs in observations}) == 2 * 21


def test_seeds_of_episodes_neither_come_back_nor_meet_those_of_another_run():
    seeds = []
    for seed in (2, 3):  # a chain of seeds of 31 bits each meets the other's at its 13,447th
        env = sac.make_env(sac.Args(env_id="Tiny-v0"))
        env.reset(seed=seed)
        for _ in range(20_000):
            env.reset()
            seeds.append(env.episode["seed"])
    assert len(set(seeds)) == len(seeds)


def test_killed_at_random_moments(tmp_path):
    kills, runs, differing = campaign(2, tmp_path, more="--total-steps 250")
    assert kills >= 2 and runs >= 1
    assert differing == 0


def test_a_run_without_a_checkpoint_is_not_begun_anew_without_a_word(tmp_path, monkeypatch, capsys):
    stopped_run(monkeypatch, 9, lambda: run(tmp_path, LONG, "stopped"))
    before = contents(tmp_path / "stopped")
    assert "args.json" in before and "checkpoint.pt" not in before
    capsys.readouterr()
    assert resume(tmp_path) == 2
    assert "checkpoint.pt" in error_line(capsys)
    assert contents(tmp_path / "stopped") == before
    assert run(tmp_path, LONG, "stopped") == 2  # nor is its folder taken


def test_a_finished_run_says_so_and_can_be_continued(tmp_path, capsys):
    run(tmp_path, LONG, "short")
    before = contents(tmp_path / "short")
    capsys.readouterr()
    assert resume(tmp_path, "short") == 0
    assert "finished after 120 steps" in capsys.readouterr().out
    after = contents(tmp_path / "short")
    assert all(after[name] == before[name] for name in ("progress.csv", "policy.pt", "checkpoint.pt"))
    run(tmp_path, f"{LONG} --total-steps 180", "whole")
    assert resume(tmp_path, "short", "--total-steps", "180") == 0
    assert same_policy(tmp_path / "short", tmp_path / "whole")
    ours = ("train_return_mean", "train_length_mean")  # its row of step 120 has no like
    last, expected = untimed(tmp_path / "short")[-1], untimed(tmp_path / "whole")[-1]
    assert last == expected | {name: last[name] for name in ours}


@pytest.mark.parametrize("noise", ["true", '"rewards"'])
def test_an_environment_that_cannot_be_replayed_gets_a_new_episode_and_a_warning(tmp_path, monkeypatch, capsys, noise):
    arguments = f'{LONG} --env-kwargs {{"noise":{noise}}}'
    stopped_run(monkeypatch, 55, lambda: run(tmp_path, arguments, "stopped"))
    capsys.readouterr()
    assert resume(tmp_path) == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "did not repeat its episode" in err
    stored = load(tmp_path / "stopped/checkpoint.pt")["episode"]
    assert len(stored["rewards"]) == len(stored["actions"]) == (120 - 55) % 20


def test_an_environment_that_repeats_itself_gets_no_warning(stopped, tmp_path, capsys):
    assert resume(tmp_path) == 0
    assert "warning" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ settings


def test_settings_of_the_algorithm_come_from_the_run(stopped, tmp_path, capsys, whole):
    before = contents(stopped)
    for more, names in {
        "--gamma 0.5": "gamma is 0.99 and cannot become 0.5",
        "--seed 5": "seed is 1 and cannot become 5",
        "--torch-threads 2": "torch_threads is 1",
        "--compile always": "compile is never",
        "--env-id Drawn-v0": "env_id is Tiny-v0",
        "--total-steps 119": "total_steps is 120 and cannot become 119",
        "--evaluate x": "evaluate",
        "--render": "render",
    }.items():
        capsys.readouterr()
        assert resume(tmp_path, "stopped", *more.split()) == 2, more
        assert names in error_line(capsys)
        assert contents(stopped) == before
    again = "--gamma 0.99 --seed 1 --batch-size 16 --eval-every 10 --eval-episodes 1 --log-every 7"
    assert resume(tmp_path, "stopped", *again.split()) == 0
    assert same_policy(stopped, whole)
    assert [row["step"] for row in rows(stopped)] == ["50", "90", "100", "110", "120"]


def test_total_steps_may_not_change_under_a_linear_schedule(tmp_path, monkeypatch, capsys):
    stopped_run(monkeypatch, 30, lambda: run(tmp_path, f"{LONG} --lr-schedule linear", "stopped"))
    capsys.readouterr()
    assert resume(tmp_path, "stopped", "--total-steps", "200") == 2
    assert "total" in error_line(capsys)


# -------------------------------------------------------------------------------------------------- broken files


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def spoilt(path):
    """Names and contents of the ways in which path can be broken."""
    data, content, target = path.read_bytes(), load(path), path.parent / "executed"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    flipped = bytearray(data)
    flipped[largest.header_offset + largest.file_size // 2] ^= 1
    yield "cut off", data[:-100]
    yield "a flipped bit", bytes(flipped)
    yield "empty", b""
    yield "a pickle", pickle.dumps(Hostile(target))
    for name, changed in [
        ("a hostile archive", content | {"seed": Hostile(target)}),
        ("another version", content | {"format": "sac-checkpoint/99"}),
        ("a policy", content | {"format": "policy/1"}),
        ("no dict", [1, 2]),
        ("no networks", content | {"networks": {}}),
        ("no buffer", content | {"buffer": 3}),
        ("no environment", content | {"env_id": 3}),
    ]:
        torch.save(changed, path)
        yield name, path.read_bytes()


def test_a_broken_checkpoint_is_one_line_and_nothing_of_it_runs(stopped, tmp_path, capsys):
    for name, broken in [*spoilt(stopped / "checkpoint.pt")]:
        (stopped / "checkpoint.pt").write_bytes(broken)
        before = contents(stopped)
        capsys.readouterr()
        assert resume(tmp_path) == 2, name
        error_line(capsys)
        after = contents(stopped)
        assert {file: after[file] for file in before if "tfevents" not in file} == {
            file: data for file, data in before.items() if "tfevents" not in file
        }, name
        assert not (stopped / "executed").exists(), name


def test_a_broken_policy_file_is_one_line_and_nothing_of_it_runs(tmp_path, capsys):
    path = tmp_path / "policy.pt"
    random_policy(path)
    for name, broken in [*spoilt(path)][:6]:
        path.write_bytes(broken)
        assert sac.main(["--evaluate", str(path)]) == 2, name
        assert "policy.pt" in error_line(capsys)
        assert [file.name for file in tmp_path.iterdir()] == ["policy.pt"], name


def test_a_file_names_no_module_to_import(stopped, tmp_path, monkeypatch, capsys):
    """Only --env-id does: a module of the current folder would run as soon as it is imported."""
    code = "import pathlib, gymnasium, envs\npathlib.Path(__file__).with_name('executed').touch()\n"
    code += "gymnasium.register('Own-v0', envs.Tiny, max_episode_steps=20)\n"
    (tmp_path / "hostile_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    capsys.readouterr()
    random_policy(tmp_path / "policy.pt", env_id="hostile_module:Own-v0")
    torch.save(load(stopped / "checkpoint.pt") | {"env_id": "hostile_module:Own-v0"}, stopped / "checkpoint.pt")
    for arguments in (["--evaluate", "policy.pt"], ["--resume", "stopped"]):
        for more in ([], ["--env-id", "Tiny-v0"]):
            if arguments[0] == "--resume" or not more:
                assert sac.main([*arguments, *more]) == 2
                error_line(capsys)
                assert not (tmp_path / "executed").exists()
    assert sac.main(["--evaluate", "policy.pt", "--env-id", "hostile_module:Own-v0", "--eval-episodes", "1"]) == 0
    assert sac.main(["--resume", "stopped", "--env-id", "hostile_module:Own-v0"]) == 0
    assert (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX systems do")
def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(tmp_path, capsys):
    """The limit lets the first checkpoints through and cuts a later, larger one off."""
    arguments = f"{TINY} --checkpoint-every 10"
    run(tmp_path, arguments, "whole")
    capsys.readouterr()
    size, (soft, hard) = (tmp_path / "whole/checkpoint.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1200, hard))
    try:
        code = run(tmp_path, arguments, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    line = error_line(capsys)
    assert "checkpoint.pt" in line and "File too large" in line
    assert 60 <= load(tmp_path / "full/checkpoint.pt")["progress"][0] < 120
    assert load(tmp_path / "full/policy.pt")["format"] == "policy/1" and len(rows(tmp_path / "full")) >= 1
    assert resume(tmp_path, "full") == 0
    assert differences(tmp_path / "full", tmp_path / "whole") == []


@pytest.mark.parametrize("name", ["args.json", "progress.csv", "policy.pt", "checkpoint.pt"])
def test_a_folder_that_cannot_be_written_is_one_line_and_loses_nothing(stopped, tmp_path, capsys, name, whole):
    before = contents(stopped)
    (stopped / f"{name}.tmp").mkdir()  # a folder in its place stops root too
    capsys.readouterr()
    assert resume(tmp_path) == 1
    assert f"{name}" in error_line(capsys)
    if name in ("args.json", "checkpoint.pt"):
        assert contents(stopped)["checkpoint.pt"] == before["checkpoint.pt"]
    (stopped / f"{name}.tmp").rmdir()
    assert resume(tmp_path) == 0
    assert differences(stopped, whole) == []


def test_what_is_saved_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    for content in ({"a": torch.ones(3)}, "text\n"):
        sac.save(tmp_path / "file", content)
    assert calls == ["fsync", "replace"] * 2
    assert (tmp_path / "file").read_bytes() == b"text\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_args_json_of_a_resumed_run_is_that_of_the_run(stopped, tmp_path):
    before = json.loads((stopped / "args.json").read_text())
    assert resume(tmp_path, "stopped", "--eval-every", "60") == 0
    assert json.loads((stopped / "args.json").read_text()) == before | {"eval_every": 60}
