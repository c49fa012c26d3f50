"""Experiment files: script x environments x variants x seeds, as a list of runs."""

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("base", "script", "environments", "seeds", "settings", "variants")
# What the sweep sets itself for every run.
RESERVED = ("env-id", "seed", "exp-name", "run-dir", "resume", "evaluate")


@dataclass(frozen=True)
class Run:
    script: Path
    variant: str
    """empty where the experiment has no variants"""
    env_id: str
    seed: int
    folder: Path
    """the run folder, OUT/EXPERIMENT[/VARIANT]/ENV__SEED; the log is beside it"""
    settings: tuple[str, ...]
    """the command line's arguments, without the folder"""

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.variant, self.folder.name)))

    def log(self, folder: Path | None = None) -> Path:
        folder = folder or self.folder
        return folder.with_name(folder.name + ".log")

    def command(self, folder: Path | None = None, script: Path | None = None) -> list[str]:
        """Starts the run, or resumes it if its folder has a checkpoint; both can be elsewhere on another machine."""
        folder = folder or self.folder
        where = "--resume" if (folder / "checkpoint.pt").exists() else "--run-dir"
        return [sys.executable, str(script or self.script), *self.settings, where, str(folder)]

    def clear(self) -> None:
        """Removes what was cut off before its first checkpoint; such a run starts anew.

        Only what a sweep has begun, as the log tells, and no finished run, which may differ in its settings alone.
        """
        kept = any((self.folder / name).exists() for name in ("checkpoint.pt", "finished.json"))
        if self.folder.exists() and not kept and self.log().exists() and self.log().stat().st_size:
            shutil.rmtree(self.folder)

    def is_finished(self) -> bool:
        """Finished with these settings. With others, the script is asked: it extends the run or refuses."""
        try:
            return json.loads((self.folder / "finished.json").read_text()) == list(self.settings)
        except (OSError, ValueError):
            return False

    def mark_finished(self) -> None:
        write_json(self.folder / "finished.json", self.settings)


def has_run(folder: Path) -> bool:
    return (folder / "args.json").exists()


def write_json(path: Path, content) -> None:
    """A whole file stands there at any time."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def normalise(settings: dict, where: str) -> dict:
    """Flag names with dashes. Raises UserError for one that the sweep sets itself."""
    settings = {str(name).replace("_", "-"): value for name, value in settings.items()}
    for name in settings:
        if name in RESERVED:
            raise UserError(f"{where}: --{name} is set by the sweep itself (environments, seeds, --out)")
    return settings


def to_arguments(settings: dict) -> list[str]:
    """{"tau": 1, "squash": False, "env-kwargs": {"a": 1}} -> --tau 1 --no-squash --env-kwargs '{"a": 1}'."""
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:  # null leaves the script's default
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return arguments


def parse_overrides(arguments: list[str]) -> dict:
    """The reverse, for what stands on the sweep's command line."""
    settings = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and len(name) > 2:
            settings[name[2:]] = [value] if equals else []
        elif not settings:
            raise UserError(f"unexpected argument {argument!r}; a setting of the script is --name value")
        else:
            settings[list(settings)[-1]].append(argument)
    for name in [name for name, values in settings.items() if not values]:
        del settings[name]
        settings[name.removeprefix("no-")] = not name.startswith("no-")
    return normalise(settings, "command line")


def read_experiment(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The file on top of its bases: settings are merged, everything else is replaced. Raises UserError."""
    if path.resolve() in seen:
        raise UserError(f"{path}: starts from itself through base:")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping with the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(KEYS)}")

    environments = content.get("environments")
    if isinstance(environments, list):
        check_names(environments, f"{path}: environments")
        content["environments"] = environments = dict.fromkeys(environments)
    mappings = {"settings": {"settings": content.get("settings")}}
    mappings |= {key: content.get(key) for key in ("environments", "variants")}
    for key, mapping in mappings.items():
        if mapping is None:
            continue
        if not isinstance(mapping, dict) or not all(isinstance(value, dict | None) for value in mapping.values()):
            raise UserError(f"{path}: {key} must map names to settings")
        check_names(mapping, f"{path}: {key}")
        mappings[key] = {name: normalise(value or {}, f"{path}: {name}") for name, value in mapping.items()}
    content |= {key: mappings[key] for key in ("environments", "variants") if mappings[key] is not None}
    content["settings"] = mappings["settings"]["settings"] or {}

    if "base" in content:
        base = read_experiment(path.parent / str(content.pop("base")), (*seen, path.resolve()))
        content = base | content | {"settings": base["settings"] | content["settings"]}
    return content


def check_names(names: Iterable, where: str) -> None:
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+=/:-]*", name) or ".." in name:
            raise UserError(f"{where}: {name!r} is no name (letters, digits and _ . + = - / :)")
        if names.count(name) > 1:
            raise UserError(f"{where}: {name} is given twice")


def check_seeds(seeds: list, where: str) -> None:
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise UserError(f"{where}: {seed!r} must be a whole number of at least 0")
        if seeds.count(seed) > 1:
            raise UserError(f"{where}: {seed} is given twice")


def make_runs(
    path: Path,
    out: Path,
    seeds: list[int] | None = None,
    environments: list[str] | None = None,
    variants: list[str] | None = None,
    overrides: dict | None = None,
) -> list[Run]:
    """The grid of an experiment file. What is given besides it wins over it. Raises UserError."""
    experiment = read_experiment(path)
    if environments:
        check_names(environments, "--environments")
        known = experiment.get("environments") or {}
        experiment["environments"] = {env_id: known.get(env_id, {}) for env_id in environments}
    if seeds:
        check_seeds(seeds, "--seeds")
        experiment["seeds"] = seeds
    for key in ("script", "environments", "seeds"):
        if not experiment.get(key):
            raise UserError(f"{path}: {key} is missing")
    if not isinstance(experiment["seeds"], list):
        raise UserError(f"{path}: seeds must be a list")
    check_seeds(experiment["seeds"], f"{path}: seeds")
    script = ROOT / str(experiment["script"])  # an absolute path stays as it is
    if not script.is_file():
        raise UserError(f"{path}: there is no script {script}")

    grid = experiment.get("variants") or {"": {}}
    for name in variants or []:
        if name not in grid:
            raise UserError(f"--variants {name}: {path} has {', '.join(filter(None, grid)) or 'no variants'}")
    runs = []
    for variant, of_variant in grid.items():
        if variants and variant not in variants:
            continue
        parent = out / path.stem / variant
        for env_id, of_env in experiment["environments"].items():
            settings = {"torch-threads": 1} | experiment["settings"] | of_env | of_variant | (overrides or {})
            for seed in experiment["seeds"]:
                own = {"env-id": env_id, "seed": seed, "exp-name": "-".join(filter(None, (path.stem, variant)))}
                folder = parent / f"{env_id.replace('/', '_').replace(':', '_')}__{seed}"
                runs.append(Run(script, variant, env_id, seed, folder, tuple(to_arguments(own | settings))))
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(f"{path}: two of its runs would share a folder, where / and : are _")
    return runs
