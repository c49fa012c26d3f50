"""Measures what a sweep costs besides its runs: sweeps of many runs that do nothing.

Example:
    python benchmark/driver_cost.py --runs 100 1000 --engine ray

Prints, for each number of runs: the time of the sweep, the processor time and the peak memory of the sweep's own
process, and the time that the same command takes again when everything is finished.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from errors import Parser, UserError, run_main

SWEEP = Path(__file__).with_name("sweep.py")
SCRIPT = """\
import sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True)
(folder / "args.json").write_text("{}")
(folder / "progress.csv").write_text("step,wall_time_s,eval_return_mean\\n1,0,0\\n")
"""
SAMPLE_S = 0.05


def watch(command: list[str]) -> tuple[float, float, float]:
    """Runs it. Returns seconds, its own processor seconds (its children's apart) and its peak memory in MB.

    Not by getrusage, whose peak is that of the largest child there has been.
    """
    started, processor_s, memory_mb = time.perf_counter(), 0.0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM" in status:  # it has no memory any more in the moment before it is gone
            processor_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            memory_mb = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with {process.returncode}")
    return time.perf_counter() - started, processor_s, memory_mb


def main() -> None:
    parser = Parser("Measure what a sweep costs besides its runs. Needs Linux.")
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000], help="numbers of runs")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="that of sweep.py")
    args = parser.parse_args()
    print("| Runs | Sweep, s | Driver's processor time, s | Driver's memory, MB | Again, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for runs in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            script, experiment = Path(folder, "nothing.py"), Path(folder, "nothing.yaml")
            script.write_text(SCRIPT)
            grid = {"script": str(script), "environments": ["None-v0"], "seeds": list(range(runs))}
            experiment.write_text(yaml.safe_dump(grid))
            command = [sys.executable, str(SWEEP), str(experiment), "--out", folder, "--engine", args.engine]
            seconds, processor_s, memory_mb = watch(command)
            again, _, _ = watch(command)
        print(f"| {runs:,} | {seconds:.1f} | {processor_s:.1f} | {memory_mb:.0f} | {again:.1f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
