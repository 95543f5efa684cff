"""A Python process in which this package is not imported, shared by the tests of a session.

Importing diffusers and transformers takes seconds, and a dozen tests look at what stock diffusers makes of a repo.
Run as a module this file is the process: it reads requests from its standard input, a JSON list of code and arguments
in a line, and answers each with a line, the result or the traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kandinsky_diffusers"


class StockProcess:
    """The process, started when it is first used."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: Any) -> Any:
        """What `code` has left in its variable `result`; `sys.argv[1:]` are the arguments, as strings.

        Raises:
            AssertionError: it has raised, or has imported this package.
        """
        if self._process is None:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        process: Any = self._process
        process.stdin.write(json.dumps([code, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        code, *arguments = json.loads(line)
        sys.argv = ["stock", *arguments]
        answers.write(json.dumps(_answer(code)) + "\n")
        answers.flush()


def _answer(code: str) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    try:
        exec(code, variables)
    except Exception:  # noqa: BLE001 (whatever it is, the test is told)
        return {"error": traceback.format_exc()}
    if any(name.split(".")[0] == PACKAGE for name in sys.modules):
        return {"error": f"{PACKAGE} was imported"}
    return {"result": variables.get("result")}


if __name__ == "__main__":
    _serve()
