"""Learning curves as read from run folders, CSV files of other programs, and tables of published results."""

import csv
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from errors import UserError

RUN_FOLDER = re.compile(r"(?P<env>.+)__(?P<seed>\d+)")
PEER_FILE = re.compile(r"(?P<label>.+?)_(?P<env>[^_]+-v\d+)_(?P<seed>\d+)\.csv")


@dataclass
class Curve:
    label: str
    env_id: str
    seed: int
    columns: dict[str, np.ndarray]
    """each (rows,); step, wall_time_s, eval_return_mean and whatever else the file has"""
    path: Path

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self.columns:
            raise UserError(f"{self.path}: has no column {column}, only {', '.join(self.columns)}")
        return self.columns[column]


@dataclass(frozen=True)
class Published:
    source: str
    url: str
    protocol: str
    env: str
    """without the version"""
    steps: int
    return_mean: float
    return_std: float
    """NaN where the source gives none"""

    @property
    def is_best(self) -> bool:
        """The highest evaluation of a run rather than its last."""
        return self.protocol.startswith("max")


def without_version(env_id: str) -> str:
    return re.sub(r"-v\d+$", "", env_id)


def read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_published(path: Path) -> list[Published]:
    try:
        return [
            Published(
                *(row[name] for name in ("source", "url", "protocol", "env")),
                int(row["steps"]),
                float(row["return_mean"]),
                float(row["return_std"] or math.nan),
            )
            for row in read_rows(path)
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a table of published results ({type(error).__name__}: {error})") from None


def read_columns(path: Path) -> dict[str, np.ndarray]:
    rows = read_rows(path)
    try:
        # A row that the script is still writing has fewer cells, or none.
        whole = [row for row in rows if None not in row.values()]
        columns = {name: np.array([float(row[name] or "nan") for row in whole]) for name in (rows[0] if rows else [])}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a table of numbers ({error})") from None
    if rows and "step" not in columns:
        raise UserError(f"{path}: has no column step")
    return columns


def read_run(folder: Path) -> Curve:
    """A run folder; env and seed from args.json or, without it, from the folder's name ENV__SEED."""
    named = RUN_FOLDER.fullmatch(folder.name)
    try:
        args = json.loads((folder / "args.json").read_text())
        env_id, seed, exp_name = str(args["env_id"]), int(args["seed"]), str(args.get("exp_name", ""))
    except FileNotFoundError:
        if not named:
            raise UserError(f"{folder}: has no args.json and is not named ENV__SEED") from None
        env_id, seed, exp_name = named["env"], int(named["seed"]), ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'args.json'}: cannot be read ({error})") from None
    # Runs of a sweep are told apart by the folder above them, those started by hand by --exp-name.
    label = str(folder.resolve().parent) if named else exp_name or folder.name
    return Curve(label, env_id, seed, read_columns(folder / "progress.csv"), folder)


def read_path(path: Path) -> list[Curve]:
    """Every run in or below a folder, or the file of another program, LABEL_ENV_SEED.csv."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_dir():
        runs = [read_run(found.parent) for found in sorted(path.rglob("progress.csv"))]
        others = [found for found in sorted(path.rglob("*.csv")) if PEER_FILE.fullmatch(found.name)]
        return runs + [curve for found in others for curve in read_path(found)]
    named = PEER_FILE.fullmatch(path.name)
    if not named:
        raise UserError(f"{path}: is neither a folder nor a file named LABEL_ENV_SEED.csv")
    return [Curve(named["label"], named["env"], int(named["seed"]), read_columns(path), path)]


def read_curves(paths: list[str]) -> list[Curve]:
    """All runs with at least one row below the paths; LABEL=PATH names those of a path. Raises UserError."""
    curves = []
    for argument in paths:
        named = "=" in argument and not os.path.exists(argument)  # a folder may have a = in its name
        label, path = argument.split("=", 1) if named else ("", argument)
        found = read_path(Path(path))
        for curve in found:
            curve.label = label or curve.label
        curves += [curve for curve in found if len(curve.columns.get("step", ()))]
    if not curves:
        raise UserError(f"{' '.join(paths)}: no run with an evaluation in it")

    # Folders as labels: what tells them apart, or the name alone where there is but one.
    folders = sorted({curve.label for curve in curves if os.path.isabs(curve.label)})
    common = os.path.commonpath(folders) if len(folders) > 1 else os.path.dirname("".join(folders))
    seen: dict[tuple, Curve] = {}
    for curve in curves:
        if curve.label in folders:
            curve.label = os.path.relpath(curve.label, common)
            if curve.label == ".":
                curve.label = os.path.basename(common)
        same = seen.setdefault((curve.label, curve.env_id, curve.seed), curve)
        if same is not curve:
            both = f"both are seed {curve.seed} of {curve.label}; LABEL=PATH names a run"
            raise UserError(f"{same.path} and {curve.path}: {both}")
    return curves


def group(curves: list[Curve]) -> dict[str, dict[str, list[Curve]]]:
    """env_id -> label -> the seeds, environments in alphabetical order, labels as they were given."""
    groups = {env_id: {} for env_id in sorted({curve.env_id for curve in curves})}
    for curve in curves:
        groups[curve.env_id].setdefault(curve.label, []).append(curve)
    return groups
