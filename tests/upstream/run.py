"""Run diffusers' own tests of Kandinsky 2.1, 2.2 and 3.0, from a checkout of diffusers, on our classes.

    python tests/upstream/run.py CHECKOUT [--stock] [pytest arguments]

The tests run offline against the installed diffusers; of the checkout only ``tests/`` is used. Tiny tokenizers made
here stand in for those that they fetch from the Hub. ``expected_failures.toml`` lists the tests that have to fail, and
why; one that is listed and passes counts as a failure. With ``--stock`` the same tests see stock's classes.

It is started by its path and not as a module, so that `tests` means the package of the checkout.
"""

from __future__ import annotations

import argparse
import os
import string
import sys
import tempfile
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest


SUITES = ("tests/pipelines/kandinsky", "tests/pipelines/kandinsky2_2", "tests/pipelines/kandinsky3")
EXPECTED_FAILURES = Path(__file__).with_name("expected_failures.toml")
REVISION = "0" * 40


def main() -> int:
    """Parse the command line, run the suites in this process, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers that has tests/pipelines/kandinsky*")
    parser.add_argument("--stock", action="store_true", help="test stock's classes, for comparison")
    arguments, pytest_arguments = parser.parse_known_args()
    checkout = arguments.checkout.resolve()
    missing = [suite for suite in SUITES if not (checkout / suite).is_dir()]
    if missing:
        parser.error(f"{checkout} is no checkout of diffusers with its tests: {', '.join(missing)} not found.")
    with tempfile.TemporaryDirectory() as hub_cache:
        # read by the libraries when they are imported, which is why nothing above imports them
        os.environ |= {"HF_HOME": hub_cache, "HF_HUB_CACHE": hub_cache, "HF_HUB_OFFLINE": "1"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
        # some tests compare runs of a random model that differ in rounding, to little more than that: less of it
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
        write_tokenizers(Path(hub_cache))
        os.chdir(checkout)
        fixed = ["-c", "pyproject.toml", "--rootdir", ".", "-p", "no:cacheprovider", "-q"]
        return pytest.main([*fixed, *pytest_arguments, *SUITES], plugins=[UpstreamTests(arguments.stock)])


class UpstreamTests:
    """A pytest plugin: puts our classes into diffusers, and marks what is expected to fail."""

    def __init__(self, stock: bool) -> None:
        import diffusers  # before the checkout's conftest puts its own src/ on the path

        self.classes = f"stock diffusers {diffusers.__version__}"
        self.expected = {}
        if not stock:
            import kandinsky_diffusers

            self.classes = f"kandinsky_diffusers {kandinsky_diffusers.__version__} in {self.classes}"
        for group in tomllib.loads(EXPECTED_FAILURES.read_text(encoding="utf-8"))["group"]:
            if group["with_stock"] == "fails" or not stock:
                self.expected |= dict.fromkeys(group["tests"], group["reason"])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say whose classes were tested."""
        terminalreporter.write_line(f"classes: {self.classes}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark the listed tests, and warn of entries that name none."""
        unused = set(self.expected)
        for item in items:
            test = item.nodeid.removeprefix("tests/pipelines/")
            if test in self.expected:
                unused.discard(test)
                item.add_marker(
                    pytest.mark.xfail(reason=self.expected[test], strict=True, raises=(AssertionError, AttributeError))
                )
        for test in sorted(unused):
            warnings.warn(f"{EXPECTED_FAILURES.name} lists {test}, which this checkout lacks", stacklevel=1)


def write_tokenizers(hub_cache: Path) -> None:
    """Fill `hub_cache` with stand-ins for the three tokenizers that the tests load, as if they had been downloaded.

    They spell texts letter by letter. (Trained ones would differ from run to run.)
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5Config, T5TokenizerFast, XLMRobertaTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    # the end of the text has the highest number, as in CLIP: its text encoder looks for the largest
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    clip = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *string.printable.strip(), "<mask>"]
    xlm_roberta = XLMRobertaTokenizerFast(vocab=[(piece, 0.0) for piece in pieces])
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.printable.strip()]
    t5 = T5TokenizerFast(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    # of the model beside the tokenizer the tests read the sizes
    sizes = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_ff=37,
        d_kv=8,
        num_layers=5,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=0.002,
    )
    save_as_downloaded(clip, hub_cache, "hf-internal-testing/tiny-random-clip")
    save_as_downloaded(t5, hub_cache, "hf-internal-testing/tiny-random-t5", sizes)
    save_as_downloaded(xlm_roberta, hub_cache, "YiYiXu/tiny-random-mclip-base")


def save_as_downloaded(tokenizer: Any, hub_cache: Path, repo_id: str, *others: Any) -> None:
    """Save `tokenizer`, and what goes with it, where `from_pretrained(repo_id)` looks for it without a network."""
    repo = hub_cache / f"models--{repo_id.replace('/', '--')}"
    for part in (tokenizer, *others):
        part.save_pretrained(repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
