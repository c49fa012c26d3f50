"""The repository's own ruff settings hold, its pages link to what there is, and its diffs apply."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("experts/*.md"), *ROOT.glob("benchmark/**/*.md")]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_modifications_in_the_readme_apply():
    source = (ROOT / "sac_continuous.py").read_text()
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for lines in map(str.splitlines, blocks):
        before, after = ("".join(line[1:] + "\n" for line in lines if line[0] in marks) for marks in (" -", " +"))
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    compile(source, "modified", "exec")
