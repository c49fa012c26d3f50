"""Runs as Ray tasks, on the nodes of a cluster that need share no folder.

A task trains in a folder of its own node and carries what has changed to the desk, an actor on the driver's node that
writes it into the run folder. When a node dies, its training processes die with it, and the sweep starts those runs
again: a new task gets what the desk has written so far and resumes from there.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TextIO

import ray
import ray.exceptions
import training_process
from errors import UserError
from grid import Run, has_run
from local_engine import LOCKED, NOT_BEGUN, REFUSED, Ended
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transfer import Piece, Receiver, pieces

MAX_SUBMITTED = 1000
"""tasks that Ray holds at a time, at work or queued: enough for any cluster to be busy or to grow"""
HEARTBEAT_S = 1.0
POLL_S = 0.2


@ray.remote(num_cpus=0)
class Desk:
    """Where tasks report. Writes what they bring, knows which runs have begun, and holds their locks."""

    def __init__(self):
        self.attempts: dict[Run, int] = {}
        self.locks: dict[Run, BinaryIO] = {}
        self.fractions: dict[Run, float] = {}
        self.receivers: dict[Run, Receiver] = {}
        self.refused_variants: set[str] = set()
        self.stopping = False

    def submit(self, run: Run, attempt: int) -> None:
        """From now on this attempt alone is heard: one on a node that was given up may still be talking."""
        self.attempts[run] = attempt
        self.fractions.pop(run, None)

    def refuse(self, variant: str) -> None:
        """At once, without a way round by the driver: no further run of the variant begins."""
        self.refused_variants.add(variant)

    def begin(self, run: Run, attempt: int) -> int | None:
        """Returns None to go on, otherwise what the task ends with."""
        if self.attempts.get(run) != attempt or run.variant in self.refused_variants or self.stopping:
            return NOT_BEGUN
        lock = training_process.lock(run.log())
        if lock is None or run.is_finished():  # by another sweep, meanwhile
            return LOCKED if lock is None else 0
        run.clear()
        self.locks[run] = lock
        self.fractions[run] = 0.0
        self.receivers[run] = Receiver(run.folder)
        return None

    def resume_from(self, run: Run) -> Iterator[Piece]:
        """What has been brought back of the run so far."""
        yield from pieces(run.folder, {})

    def report(self, run: Run, attempt: int, fraction: float) -> bool:
        """Returns whether to go on."""
        heard = self.attempts.get(run) == attempt
        if heard:
            self.fractions[run] = fraction
        return heard and not self.stopping

    def bring(self, run: Run, attempt: int, piece: Piece) -> None:
        if self.attempts.get(run) == attempt:
            self.receivers[run].accept(piece)

    def running(self) -> dict[Run, float]:
        return self.fractions

    def end(self, run: Run) -> None:
        for of_runs in (self.attempts, self.locks, self.fractions, self.receivers):
            of_runs.pop(run, None)  # nothing else refers to a lock, which thus is closed

    def stop(self) -> list[Run]:
        """Returns those at work, which now end."""
        self.stopping = True
        return list(self.fractions)


def train(run: Run, attempt: int, desk, shared_out: bool, bring_back_every: float) -> int | None:
    """The task: one run from its start or its last state to its end. Returns the script's exit code."""
    # Ray lends the processors of a task out to others while its main thread waits in ray.get; ours are not idle then.
    with ThreadPoolExecutor(1) as thread:

        def wait_for(reference):
            return thread.submit(ray.get, reference).result()

        refusal = wait_for(desk.begin.remote(run, attempt))
        if refusal is not None:
            return refusal
        script = Path.cwd() / "script" / run.script.name  # as shipped with the job
        with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
            env = {"TMPDIR": scratch} | ({} if ray.get_gpu_ids() else {"CUDA_VISIBLE_DEVICES": ""})
            folder = run.folder if shared_out else Path(scratch, run.folder.name)
            sent = {}

            def bring_back():
                for piece in [] if shared_out else pieces(folder, sent):
                    wait_for(desk.bring.remote(run, attempt, piece))

            if not shared_out:
                thread.submit(fetch, run, desk, Receiver(folder)).result()
            fresh, log = not has_run(folder), run.log(folder)
            process = training_process.start(run.command(folder, script), log, env, cwd=script.parent)
            try:
                brought_back = time.monotonic()
                go_on = True
                while go_on and process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(HEARTBEAT_S)
                    go_on = wait_for(desk.report.remote(run, attempt, training_process.fraction_done(log)))
                    if time.monotonic() - brought_back > bring_back_every:
                        bring_back()
                        brought_back = time.monotonic()
                bring_back()
                if process.returncode == REFUSED and fresh:
                    wait_for(desk.refuse.remote(run.variant))
            finally:
                training_process.kill(process)
    return process.returncode


def fetch(run: Run, desk, receiver: Receiver) -> None:
    for reference in desk.resume_from.remote(run):
        receiver.accept(ray.get(reference))


@contextlib.contextmanager
def stderr_to(file: TextIO) -> Iterator[None]:
    """Of the whole process, Ray's C++ part included."""
    ours = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def check_reachable(address: str) -> None:
    """Raises UserError at once where Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--address {address}: no HOST:PORT that answers ({error})") from None


def can_run(node: dict, cpus: float, gpus: float) -> bool:
    return node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus


def ship(script: Path) -> str:
    """A folder with what a task needs: these modules, the script, and the experts beside it."""
    folder = tempfile.mkdtemp(prefix="sweep-code-")
    for path in Path(__file__).parent.glob("*.py"):
        shutil.copy(path, folder)
    Path(folder, "script").mkdir()
    shutil.copy(script, Path(folder, "script"))
    if (script.parent / "experts").is_dir():
        shutil.copytree(script.parent / "experts", Path(folder, "script", "experts"))
    return folder


class RayEngine:
    def __init__(
        self,
        script: Path,
        log: Path,
        address: str | None,
        cpus_per_run: float,
        gpus_per_run: float,
        shared_out: bool,
        bring_back_every: float,
    ):
        if address and address.startswith("ray://"):
            raise UserError(f"--address {address}: run the sweep on a machine of the cluster instead, with auto")
        if address and address != "auto":
            check_reachable(address)
        with contextlib.ExitStack() as stack:
            code = ship(script)
            stack.callback(shutil.rmtree, code)
            messages = stack.enter_context(open(log, "a"))
            stack.enter_context(contextlib.redirect_stdout(messages))  # a dead node's last words, say
            try:
                with stderr_to(messages):
                    ray.init(
                        address or "local",
                        runtime_env={"working_dir": code},
                        log_to_driver=False,
                        logging_level="ERROR",
                        **({} if address else {"include_dashboard": False}),
                    )
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                hint = "; is a Ray cluster there, and is RAY_AUTH_TOKEN the same here?" if address else ""
                what = f"--address {address}" if address else "--engine ray"
                raise UserError(f"{what}: {reason}{hint} More in {log}") from None
            stack.callback(ray.shutdown)
            if not any(can_run(node, cpus_per_run, gpus_per_run) for node in ray.nodes()):
                message = f"no node has {cpus_per_run:g} processors and {gpus_per_run:g} GPUs for a run"
                if not address:
                    raise UserError(f"{message}: lower --cpus-per-run or --gpus-per-run")
                print(f"warning: {message} now; waiting for one to join", file=sys.stderr)
            self.stack = stack.pop_all()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.desk = Desk.options(scheduling_strategy=here).remote()
        self.task = ray.remote(train).options(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=0)
        self.arguments = shared_out, bring_back_every
        self.submitted: dict[ray.ObjectRef, Run] = {}
        self.attempts = 0

    def has_room(self) -> bool:
        return len(self.submitted) < MAX_SUBMITTED

    def start(self, run: Run) -> None:
        self.attempts += 1
        ray.get(self.desk.submit.remote(run, self.attempts))  # before the task can ask whether it may begin
        reference = self.task.remote(run, self.attempts, self.desk, *self.arguments)
        self.submitted[reference] = run

    def is_busy(self) -> bool:
        return bool(self.submitted)

    def poll(self) -> list[Ended]:
        if not self.submitted:
            return []
        ready, _ = ray.wait(list(self.submitted), num_returns=len(self.submitted), timeout=POLL_S)
        ended = [self.result(reference, self.submitted.pop(reference)) for reference in ready]
        for one in ended:
            if one.exit_code == 0:
                one.run.mark_finished()  # while no other sweep can begin it
            self.desk.end.remote(one.run)
        return ended

    def result(self, reference: ray.ObjectRef, run: Run) -> Ended:
        try:
            return Ended(run, ray.get(reference))
        except (ray.exceptions.RayTaskError, ray.exceptions.OutOfMemoryError) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ray.exceptions.RayError) and not isinstance(cause, ray.exceptions.RayTaskError):
                return Ended(run, None, type(cause).__name__)  # the task lost touch with the desk: not its run's fault
            return Ended(run, 1, str(error).strip().splitlines()[-1])
        except ray.exceptions.RayError as error:
            return Ended(run, None, type(error).__name__)

    def running(self) -> dict[Run, float]:
        return ray.get(self.desk.running.remote())

    def close(self) -> None:
        """Ends every run; what each has saved is brought back before."""
        with self.stack, contextlib.suppress(ray.exceptions.RayError):
            at_work = ray.get(self.desk.stop.remote())
            references = [reference for reference, run in self.submitted.items() if run in at_work]
            if references:
                ray.wait(references, num_returns=len(references))
