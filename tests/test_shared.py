"""What two scripts both need stands in both, worded the same."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = "UserError RunError flag check_finite replacing load_file load_policy write_args read_args cut_rows"
SHARED += " open_run_dir load_checkpoint main follow FrameText RealSpeed make_drawn_env record_video"
SHARED += " print_where_all_is log_settings"
SHARED_BY_TWO = (
    "FIELDS PickledDtype PickledArray ArrayUnpickler PickledExpert join unpickle numbers pickled_array rollout"
)
SHARED_BY_TWO += (
    " read_pickle check_sizes demonstrate stream nll_loss mse_loss bc_loss policy_of evaluate make_env Actor"
)
SHARED_BY_TWO += " gradient_step set_up_torch evaluate_policy action_scale some_of distance_from_demonstrations"


@functools.cache
def definitions(script):
    """Their source by name, methods as CLASS.METHOD."""
    text = (ROOT / script).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        nodes = dict.fromkeys([*names, getattr(node, "name", None)], node)
        if isinstance(node, ast.ClassDef):
            nodes |= {f"{node.name}.{method.name}": method for method in node.body if hasattr(method, "name")}
        found |= {name: lines[part.lineno - 1 : part.end_lineno] for name, part in nodes.items()}
    return found


@pytest.mark.parametrize(
    ("scripts", "names"),
    [
        (["sac_continuous.py", "bc.py", "dagger.py"], SHARED.split()),
        (["bc.py", "dagger.py"], SHARED_BY_TWO.split()),
        (["sac_continuous.py", "bc.py"], ["RunLog.video"]),
    ],
)
def test_shared_definitions_are_worded_the_same(scripts, names):
    first, *others = (definitions(script) for script in scripts)
    for other in others:
        assert [name for name in names if first[name] != other[name]] == []
