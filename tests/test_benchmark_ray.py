"""Sweeps on a Ray cluster whose nodes are processes on this machine, each with a folder of its own and none shared."""

import contextlib
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
from sweeps import command, is_alive, last_start, pids, policies, run, run_process, wait_until, write_experiment

ray = pytest.importorskip("ray", reason="pip install -r benchmark/requirements.txt")


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
        self.starter = subprocess.Popen(
            ray, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_for_start(self):
        output, _ = self.starter.communicate(timeout=600)
        assert self.starter.returncode == 0, output
        return self

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
            os.killpg(self.starter.pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(""))
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """A head that runs nothing, the driver's node, and nodes of one processor each."""

    def __init__(self):
        port = free_port()
        self.head = Node(
            *("--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"),
            *("--ray-client-server-port", str(free_port())),
        ).wait_for_start()
        self.address = f"127.0.0.1:{port}"
        self.workers = [self.add_worker(), self.add_worker()]
        for node in self.workers:
            node.wait_for_start()

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


def test_a_node_dies_and_the_policies_are_those_of_a_local_sweep(tmp_path, cluster):
    experiment = write_experiment(tmp_path, seeds=[1, 2, 3], settings={"total-steps": 60})
    arguments = command("sweep", experiment, "--out", tmp_path / "ray", "--step-s", 0.05, *on(cluster))
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    victim = cluster.workers.pop()
    out = tmp_path / "ray/grid"

    def run_on_victim():
        """The one that trains there, once a checkpoint of it has been brought back."""
        for log in out.glob("*.log"):
            if str(victim.folder) in log.read_text() and (log.with_suffix("") / "checkpoint.pt").exists():
                return log
        return None

    log = wait_until(run_on_victim)
    training = victim.processes("script/stand_in.py")
    assert len(training) == 1
    os.kill(training[0], signal.SIGSTOP)  # it shall not end before its node does
    victim.kill_raylet()
    wait_until(lambda: not is_alive(training[0]))
    cluster.workers.append(cluster.add_worker())
    stderr = sweep.communicate(timeout=600)[1]
    cluster.workers[-1].wait_for_start()
    victim.close()

    assert sweep.returncode == 0 and "3 runs: 3 finished" in stderr, stderr
    assert f"lost      {log.stem}" in stderr and "Traceback" not in stderr
    attempts = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert len(attempts) == 2 and "--run-dir" in attempts[0] and "--resume" in attempts[1]
    assert str(victim.folder) not in attempts[1] and last_start(log) > 0
    run("sweep", experiment, "--out", tmp_path / "local")
    assert len(policies(out)) == 3
    assert policies(out) == policies(tmp_path / "local/grid")
    rows = [(folder / f"grid/{log.stem}/progress.csv").read_text() for folder in (tmp_path / "ray", tmp_path / "local")]
    assert rows[0] == rows[1]


def test_crashes_and_refusals_on_processors_that_serve_one_run_at_a_time(tmp_path, cluster):
    variants = {"wrong": {"sted-s": 1}, "once": {"crash": "once"}, "anew": {"crash": "once", "checkpoints": False}}
    variants["always"] = {"crash": "always"}
    experiment = write_experiment(tmp_path, variants=variants, seeds=[1, 2, 3], settings={"step-s": 0.01})
    arguments = command("sweep", experiment, "--out", tmp_path / "out", *on(cluster))
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    most = 0
    while sweep.poll() is None:
        most = max(most, *(len(node.processes("script/stand_in.py")) for node in cluster.workers))
        time.sleep(0.02)
    stderr = sweep.communicate()[1]
    assert sweep.returncode == 1 and most == 1 and "Traceback" not in stderr
    refused = stderr.count("refused   wrong/")
    assert 1 <= refused <= 2 and "unrecognized arguments: --sted-s 1" in stderr
    for count in ("6 finished", "3 failed", f"{refused} refused", f"{3 - refused} not started"):
        assert count in stderr.splitlines()[-1], stderr
    assert stderr.count("    the dog ate my gradients") == 3
    assert last_start(tmp_path / "out/grid/once/A-v0__1.log") == 10
    assert last_start(tmp_path / "out/grid/anew/A-v0__1.log") == 0


def stop(sweep: subprocess.Popen) -> str:
    """As Ctrl-C does. Returns what it said since."""
    os.killpg(sweep.pid, signal.SIGINT)
    stdout, stderr = sweep.communicate(timeout=600)
    assert sweep.returncode == 130 and "Traceback" not in stderr and not stdout, stderr
    return stderr


def test_a_sweep_keeps_others_off_its_runs_and_once_stopped_another_goes_on(tmp_path, cluster):
    experiment, out = write_experiment(tmp_path, seeds=[1, 2, 3], settings={"total-steps": 60}), tmp_path / "out"
    logs = [out / f"grid/A-v0__{seed}.log" for seed in (1, 2, 3)]
    run("sweep", experiment, "--out", tmp_path / "local")
    arguments = command("sweep", experiment, "--out", out, "--step-s", 0.3, "--cpus-per-run", 0.5, *on(cluster))
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: all((log.with_suffix("") / "checkpoint.pt").exists() for log in logs))

    complaint = "refused   A-v0__1: another sweep is working on it; wait for it or stop it\n1 runs: 1 refused\n"
    shared = ["--out", out, "--engine", "ray", "--address", cluster.address, "--shared-out"]
    assert run_process("sweep", experiment, "--seeds", 1, "--cpus-per-run", 0.5, *shared, code=2).stderr == complaint
    assert run("sweep", experiment, "--seeds", 1, "--out", out, code=2).stderr == complaint
    assert [len(pids(log)) for log in logs] == [1, 1, 1]

    assert "3 runs: 3 left" in stop(sweep)
    assert not any(is_alive(pid) for log in logs for pid in pids(log))
    run_process("sweep", experiment, *shared)
    assert f"--resume {out}/grid/A-v0__1\n" in logs[0].read_text() and last_start(logs[0]) > 0
    assert policies(out / "grid") == policies(tmp_path / "local/grid")
    assert not list(out.rglob(".*.part"))


def test_ray_started_on_this_machine_brings_back_what_there_is_and_leaves_nothing(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # as the cluster of the other tests has set them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    environments = {"A-v0": {"total-steps": 30}, "B-v0": {"total-steps": 100}}
    experiment = write_experiment(tmp_path, environments=environments, seeds=[1])
    arguments = ("--engine", "ray", "--bring-back-every", 600, "--cpus-per-run", 0.5, "--step-s", 0.07)
    sweep = subprocess.Popen(
        command("sweep", experiment, "--out", tmp_path / "out", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sweep.stderr.readline() == "finished  A-v0__1 (1 of 2)\n"
    assert "2 runs: 1 finished, 1 left" in stop(sweep)
    log = tmp_path / "out/grid/B-v0__1.log"
    assert len(pids(log)) == 1 and not is_alive(pids(log)[0])
    run("sweep", experiment, "--out", tmp_path / "out")
    assert last_start(log) > 0 and len(policies(tmp_path)) == 2
    assert not list((tmp_path / "home").rglob("*token*"))


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
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # in which a sweep sets Ray's
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
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
