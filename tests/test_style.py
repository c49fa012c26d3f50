"""The rules of the house: ruff's, the scripts' length and order, pages that link to what there is, diffs that apply."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("experts/*.md"), *ROOT.glob("benchmark/**/*.md")]
LONGEST = {"sac_continuous.py": 650, "bc.py": 420, "dagger.py": 470}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LONGEST)
def test_a_script_is_read_in_one_sitting_and_its_algorithm_stands_first(script):
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) <= LONGEST[script]
    ends = {getattr(node, "name", ""): node.end_lineno for node in ast.parse(text).body}
    order = [name for name in ends if name in ("Args", "Actor", "train", "make_env", "main")]
    assert order == ["Args", "Actor", "train", "make_env", "main"]
    assert ends["train"] <= 0.75 * len(text.splitlines())


@pytest.mark.parametrize("script", LONGEST)
def test_a_script_needs_what_requirements_txt_has_and_no_file_of_ours(script):
    nodes = [node for node in ast.walk(ast.parse((ROOT / script).read_text())) if hasattr(node, "names")]
    modules = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
    found = {module.split(".")[0].replace("PIL", "pillow") for module in modules if "." not in module[:1]}
    installed = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    foreign = {name for name in found if name not in sys.stdlib_module_names}
    assert len(foreign) > 4 and foreign <= installed
    assert "matplotlib" in installed and not installed & {"ruff", "minari", "h5py", "ray"}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_pictures_lead_somewhere(page):
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor and target.is_file() else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if "://" not in link and (not target.exists() or (anchor and anchor not in slugs)):
            missing.append(link)
    assert missing == []


def test_the_modifications_in_the_pages_apply():
    source = (ROOT / "sac_continuous.py").read_text()
    blocks = [block for page in PAGES for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL)]
    assert blocks
    for lines in map(str.splitlines, blocks):
        before, after = ("".join(line[1:] + "\n" for line in lines if line[:1] in marks) for marks in (" -", " +"))
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    compile(source, "modified", "exec")
