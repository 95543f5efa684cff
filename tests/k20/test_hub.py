"""The three AutoPipelines load the converted 2.0 repos by an id on the Hub (a fake one on this machine)."""

from __future__ import annotations

from pathlib import Path

from tests.support.fake_hub import FakeHub
from tests.support.processes import PythonProcess


LOAD_FROM_HUB = """
import kandinsky_diffusers
import diffusers
repos = {"Text2Image": "kandinsky-2-0", "Image2Image": "kandinsky-2-0", "Inpainting": "kandinsky-2-0-inpaint"}
pipes = {
    task: getattr(diffusers, f"AutoPipelineFor{task}").from_pretrained(f"somebody/{repo}")
    for task, repo in repos.items()
}
result = {task: type(pipe).__name__ for task, pipe in pipes.items()}
"""


def test_the_auto_pipelines_load_by_id(converted_20: Path, hub: FakeHub, from_hub: PythonProcess) -> None:
    hub.repos |= {f"somebody/{folder.name}": folder for folder in converted_20.iterdir() if folder.is_dir()}
    assert from_hub.run(LOAD_FROM_HUB) == {
        "Text2Image": "KandinskyV20Pipeline",
        "Image2Image": "KandinskyV20Img2ImgPipeline",
        "Inpainting": "KandinskyV20InpaintPipeline",
    }
