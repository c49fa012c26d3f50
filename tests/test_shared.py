"""What two scripts both need stands in both, worded the same."""

import ast
from itertools import combinations

import pytest
from imitation import ROOT

# Definitions that two scripts have and word in their own ways. All others are worded the same, and these are not.
OF_EACH = {"RULES", "train", "Args.batch_size", "Args.eval_episodes", "Args.exp_name"}
OF_SAC = {"Actor", "Actor.__init__", "Actor.sample", "POLICY", "evaluate", "log", "main", "make_env", "record"}
OF_SAC |= {"Args.env_id", "Args.num_layers", "Args.log_every"}
OWN_WORDING = {
    "sac_continuous.py bc.py": OF_EACH | OF_SAC | {"Args.eval_every"},
    "sac_continuous.py dagger.py": OF_EACH | OF_SAC | {"Args.video_every", "Args.buffer_size", "Args.lr_schedule"},
    "bc.py dagger.py": OF_EACH
    | {"Args.video_every", "Args.expert_data", "Args.learning_rate", "Args.loss"}
    | {"batches", "DEMONSTRATIONS", "BATCHES", "EVALUATION"},
}


def names(node):
    """Of a definition or an assignment, `a, b = ...` included."""
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if hasattr(node, "target") else [])
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def definitions(script):
    """Source lines by name: top-level definitions, a class without its fields and methods, these as CLASS.NAME."""
    text = (ROOT / script).read_text()
    lines, found = text.splitlines(), {}

    def numbers(node):
        return set(range(node.lineno - len(getattr(node, "decorator_list", [])), node.end_lineno + 1))

    for node in ast.parse(text).body:
        own = numbers(node)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            for name in names(part):
                found[f"{node.name}.{name}"] = [lines[i - 1] for i in sorted(numbers(part))]
                own -= numbers(part)
        found |= {name: [lines[i - 1] for i in sorted(own) if lines[i - 1]] for name in names(node)}
    return found


@pytest.mark.parametrize("scripts", [*combinations(["sac_continuous.py", "bc.py", "dagger.py"], 2)], ids=" ".join)
def test_shared_definitions_are_worded_the_same(scripts):
    first, second = map(definitions, scripts)
    common = first.keys() & second.keys()
    assert {"Actor.__init__", "Args.seed", "save", "Failure", "make_env", "POLICY_SETTINGS"} <= common
    assert {name for name in common if first[name] != second[name]} == OWN_WORDING[" ".join(scripts)]
