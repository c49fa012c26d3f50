"""Sweeps on a Ray cluster whose nodes are processes on this machine, each with a folder of its own and none shared."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install -r benchmark/requirements.txt")

from test_benchmark import command, grid, is_alive, pids, policies, run, wait_until, write_experiment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Node:
    """What `ray start` starts, killed as a power cut would."""

    def __init__(self, *arguments):
        # Short: the path of a socket below it has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="node"))
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--temp-dir", str(self.folder), *arguments]
        env = os.environ | {"TMPDIR": str(self.folder)}
        starter = subprocess.Popen(
            ray, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        output, _ = starter.communicate(timeout=600)
        assert starter.returncode == 0, output
        self.group = starter.pid

    def processes(self, what: str) -> list[int]:
        """Of this node, those with `what` in their command line."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in text and what in text:
                found.append(int(path.parent.name))
        return found

    def kill_raylet(self) -> None:
        for pid in self.processes("raylet/raylet"):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill_raylet()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        wait_until(lambda: not self.processes(""))
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """A head that runs nothing, the driver's node, and nodes of one processor each."""

    def __init__(self):
        port = free_port()
        self.head = Node(
            *("--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"),
            *("--ray-client-server-port", str(free_port())),
        )
        self.address = f"127.0.0.1:{port}"
        self.workers = [self.add_worker(), self.add_worker()]

    def add_worker(self) -> Node:
        return Node("--address", self.address, "--num-cpus", "1")

    def close(self) -> None:
        for node in [*self.workers, self.head]:
            node.close()


@pytest.fixture(scope="module")
def cluster():
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster()
    yield cluster
    cluster.close()
    patch.undo()


def on(cluster: Cluster) -> list[str]:
    return ["--engine", "ray", "--address", cluster.address, "--bring-back-every", "0.5"]


def commit(folder: Path) -> str:
    """Puts the experiment there under git, or what has changed in it. Returns the revision."""
    (folder / "change").write_text(secrets.token_hex())
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "change", "stand_in.py"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def read_settings(run_folder: Path) -> dict:
    return json.loads((run_folder / "args.json").read_text())


def test_a_node_dies_and_the_policies_are_those_of_a_local_sweep(tmp_path, cluster):
    settings = {"total-steps": 6000, "learning-starts": 100, "random-steps": 50, "batch-size": 16, "hidden-size": 16}
    settings |= {"eval-every": 1000, "eval-episodes": 1, "checkpoint-every": 200, "buffer-size": 1000}
    content = {"script": "sac_continuous.py", "environments": ["Pendulum-v1"], "seeds": [1, 2, 3], "settings": settings}
    experiment = tmp_path / "real.yaml"
    experiment.write_text(json.dumps(content))

    sweep = subprocess.Popen(
        command("sweep", experiment, "--out", tmp_path / "ray", *on(cluster)), stderr=subprocess.PIPE, text=True
    )
    victim = cluster.workers.pop()
    out = tmp_path / "ray/real"

    def run_on_victim():
        """The one that trains there, once a checkpoint of it has been brought back."""
        for log in out.glob("*.log"):
            if str(victim.folder) in log.read_text() and (log.with_suffix("") / "checkpoint.pt").exists():
                return log
        return None

    log = wait_until(run_on_victim)
    training = victim.processes("script/sac_continuous.py")
    assert len(training) == 1
    os.kill(training[0], signal.SIGSTOP)  # it shall not end before its node does
    victim.kill_raylet()
    wait_until(lambda: not is_alive(training[0]))
    stderr = sweep.communicate(timeout=600)[1]
    victim.close()
    cluster.workers.append(cluster.add_worker())

    assert sweep.returncode == 0 and "3 runs: 3 finished" in stderr, stderr
    assert f"lost      {log.stem}" in stderr and "Traceback" not in stderr
    attempts = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert len(attempts) == 2 and "--run-dir" in attempts[0] and "--resume" in attempts[1]
    assert str(cluster.workers[0].folder) in attempts[1]
    run("sweep", experiment, "--out", tmp_path / "local")
    assert len(policies(out)) == 3
    assert policies(out) == policies(tmp_path / "local/real")
    rows = [(folder / f"real/{log.stem}/progress.csv").read_text() for folder in (tmp_path / "ray", tmp_path / "local")]
    steps, returns = ([[row.split(",")[i] for row in text.splitlines()] for text in rows] for i in (0, 2))
    assert steps[0] == steps[1] and returns[0] == returns[1]


def test_crashes_and_refusals_on_the_cluster(tmp_path, cluster):
    variants = {"wrong": {"sted-s": 1}, "once": {"crash": "once"}, "always": {"crash": "always"}}
    experiment = write_experiment(tmp_path, variants=variants, seeds=list(range(6)))
    result = run("sweep", experiment, "--out", tmp_path / "out", *on(cluster), code=1)
    refused = result.stderr.count("refused   wrong/")
    assert 1 <= refused <= 3 and "unrecognized arguments: --sted-s 1" in result.stderr
    for count in ("6 finished", "6 failed", f"{refused} refused", f"{6 - refused} not started"):
        assert count in result.stderr.splitlines()[-1], result.stderr
    assert result.stderr.count("    the dog ate my gradients") == 6
    assert "from step 10" in (tmp_path / "out/grid/once/A-v0__0.log").read_text()


def test_one_processor_serves_one_run_at_a_time(tmp_path, cluster):
    experiment = write_experiment(tmp_path, seeds=list(range(6)), settings={"total-steps": 10, "step-s": 0.1})
    sweep = subprocess.Popen(command("sweep", experiment, "--out", tmp_path, *on(cluster)), stderr=subprocess.DEVNULL)
    most = 0
    while sweep.poll() is None:
        most = max(most, *(len(node.processes("script/stand_in.py")) for node in cluster.workers))
        time.sleep(0.02)
    assert sweep.returncode == 0 and most == 1


@pytest.mark.parametrize("address", ["cluster", "none"])
def test_a_sweep_is_stopped_and_goes_on(tmp_path, cluster, address):
    engine = on(cluster) if address == "cluster" else ["--engine", "ray", "--bring-back-every", "0.5"]
    experiment = write_experiment(tmp_path, seeds=[1, 2, 3], settings={"total-steps": 100})
    run("sweep", experiment, "--out", tmp_path / "local")
    arguments = command("sweep", experiment, "--out", tmp_path / "out", "--step-s", 0.07, *engine)
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    out = tmp_path / "out/grid"
    wait_until(lambda: len(list(out.glob("*/checkpoint.pt"))) == 2)
    os.killpg(sweep.pid, signal.SIGINT)
    stderr = sweep.communicate(timeout=600)[1]
    assert sweep.returncode == 130 and "3 runs: 3 left" in stderr
    assert not any(is_alive(pid) for log in out.glob("*.log") for pid in pids(log))
    steps = [json.loads(path.read_text())["step"] for path in out.glob("*/checkpoint.pt")]
    assert any(step % 5 for step in steps), steps  # what a run saved on being stopped has come back
    run("sweep", experiment, "--out", tmp_path / "out", *engine)
    assert policies(out) == policies(tmp_path / "local/grid")
    assert not list(out.glob(".*.incoming"))


def test_sweeps_of_the_same_results_keep_out_of_each_others_runs(tmp_path, cluster):
    experiment, out = write_experiment(tmp_path, seeds=[1]), tmp_path / "out"
    complaint = "refused   A-v0__1: another process is working on it; wait for it or stop it\n1 runs: 1 refused\n"
    arguments = command("sweep", experiment, "--out", out, "--step-s", 1, *on(cluster))
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    log = out / "grid/A-v0__1.log"
    wait_until(lambda: log.exists() and pids(log))
    for engine in (on(cluster), []):
        assert run("sweep", experiment, "--out", out, *engine, code=2).stderr == complaint
    sweep.send_signal(signal.SIGINT)
    assert "1 runs: 1 left" in sweep.communicate(timeout=600)[1] and sweep.returncode == 130
    assert len(pids(log)) == 1

    shared = ["--engine", "ray", "--address", cluster.address, "--shared-out"]
    lock = grid.take_lock(out / "grid/A-v0__1")  # as a script does that a local sweep has started
    for engine in (on(cluster), shared):
        assert run("sweep", experiment, "--out", out, *engine, code=2).stderr == complaint
    lock.release()
    assert "1 runs: 1 finished" in run("sweep", experiment, "--out", out, *on(cluster)).stderr


def test_a_folder_that_all_nodes_see(tmp_path, cluster):
    experiment = write_experiment(tmp_path, seeds=[1, 2])
    revision = commit(tmp_path)
    arguments = ["--engine", "ray", "--address", cluster.address, "--shared-out"]
    run("sweep", experiment, "--out", tmp_path / "out", *arguments)
    assert read_settings(tmp_path / "out/grid/A-v0__1")["git_revision"] == revision
    run("sweep", experiment, "--out", tmp_path / "local")
    assert policies(tmp_path / "out/grid") == policies(tmp_path / "local/grid")
    assert f"--run-dir {tmp_path}/out/grid/A-v0__1" in (tmp_path / "out/grid/A-v0__1.log").read_text()


def test_ray_started_on_this_machine_leaves_nothing(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # as the cluster of the other tests has set them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    experiment = write_experiment(tmp_path, seeds=[1])
    for total_steps in (20, 30):  # the second sweep resumes
        revision = commit(tmp_path)
        arguments = ["--out", tmp_path / "out", "--engine", "ray", "--total-steps", total_steps]
        result = run("sweep", experiment, *arguments)
        assert "1 runs: 1 finished" in result.stderr and result.stdout == ""
        found = read_settings(tmp_path / "out/grid/A-v0__1")
        assert (found["git_revision"], found["total_steps"]) == (revision, total_steps)
    assert "from step 20" in (tmp_path / "out/grid/A-v0__1.log").read_text()
    assert policies(tmp_path) and not list((tmp_path / "home").rglob("*token*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--address", f"127.0.0.1:{free_port()}"], "no HOST:PORT that answers"),
        (["--address", "somewhere"], "no HOST:PORT that answers"),
        (["--address", "ray://head:10001"], "run the sweep on a machine of the cluster"),
        (["--cpus-per-run", "4096"], "no node has 4096 processors"),
        (["--gpus-per-run", "-1"], "must be 0 or more"),
        (["--shared-out", "--bring-back-every", "3"], "contradict"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, complaint):
    experiment = write_experiment(tmp_path)
    result = run("sweep", experiment, "--out", tmp_path / "out", "--engine", "ray", *arguments, code=2)
    assert complaint in result.stderr and result.stderr.count("\n") == 1


def test_a_task_that_loses_touch_with_the_desk_is_started_again(monkeypatch):
    import ray_engine
    from ray.exceptions import ActorUnavailableError, RayTaskError

    for cause, code in ((ActorUnavailableError("gone", None), None), (OSError("disk full"), 1)):

        def fail(reference, cause=cause):
            raise RayTaskError("train", "the traceback", cause)

        monkeypatch.setattr(ray_engine.ray, "get", fail)
        assert ray_engine.RayEngine.result(None, None, None).exit_code == code
