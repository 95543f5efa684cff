"""Scripts stay thin and do what the command line does."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "conversion_scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_listed(script):
    assert len(script.read_text().splitlines()) <= 30
    assert script.name in (ROOT / "conversion_scripts" / "README.md").read_text()


def test_the_2_1_script_plans_an_inventory(monkeypatch, capsys):
    script = str(ROOT / "conversion_scripts" / "convert_kandinsky_2_1.py")
    inventory = ROOT / "tests" / "data" / "inventory" / "k21_prior_fp16.ckpt.json.gz"
    monkeypatch.setattr(sys, "argv", [script, "--plan", str(inventory)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert not ended.value.code
    assert "256 keys make 336 tensors" in capsys.readouterr().out


CONVERT_FROM_HUB = """
import sys
from kandinsky_diffusers.conversion import convert
output, config = sys.argv[1:]
report = convert("someone/Kandinsky_2.1", output, clip="someone/clip", original_config=config)
result = [repo.name for repo in report.repos]
"""


def test_release_and_clip_may_be_hub_repositories(release_21, goldens_21, hub, from_hub, tmp_path):
    hub.repos |= {"someone/Kandinsky_2.1": release_21, "someone/clip": release_21 / "clip"}
    written = from_hub.run(CONVERT_FROM_HUB, tmp_path / "out", goldens_21.path / "hyperparameters.json")
    assert written == ["kandinsky-2-1-prior", "kandinsky-2-1", "kandinsky-2-1-inpaint"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(written)
