"""Python processes that the tests of a session share.

Importing diffusers and transformers takes seconds; some tests look at what stock diffusers makes of a repository where
this package is missing, others at what is loaded from a Hub, whose address is read at import. Run as a module this
file is such a process: it reads requests from its standard input, a JSON list of code and arguments in a line, and
answers each with a line, the result or the traceback.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kandinsky_diffusers"


class PythonProcess:
    """A process, started when it is first used.

    Args:
        environment: what it has beside the environment of the tests.
        is_stock: whether this package must not be imported in it.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, is_stock: bool = False) -> None:
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._is_stock = is_stock
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: Any) -> Any:
        """What `code` has left in its variable `result`; `sys.argv[1:]` are the arguments, as strings.

        Raises:
            AssertionError: it has raised, or has imported this package where it must not.
        """
        answer = self._ask(code, arguments, in_child=False)
        assert not (self._is_stock and answer["has_package"]), f"{PACKAGE} was imported"
        return answer["result"]

    def run_in_child(self, code: str, *arguments: Any) -> Any:
        """The same in a child of the process, which ends afterwards: what `code` imports is imported there alone.

        Raises:
            AssertionError: it has raised.
        """
        return self._ask(code, arguments, in_child=True)["result"]

    def _ask(self, code: str, arguments: Sequence[Any], in_child: bool) -> dict[str, Any]:
        if self._process is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, env=self._environment, text=True, **pipes)
        process: Any = self._process
        process.stdin.write(json.dumps([in_child, code, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _serve() -> None:
    gc.set_threshold(20_000, 20, 20)  # little of what imports make is garbage
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        in_child, code, *arguments = json.loads(line)
        sys.argv = ["code", *arguments]
        if in_child and os.fork():
            os.wait()
            continue
        answers.write(json.dumps(_answer(code)) + "\n")
        answers.flush()
        if in_child:
            os._exit(0)


def _answer(code: str) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    try:
        exec(code, variables)
    except Exception:  # noqa: BLE001 (whatever it is, the test is told)
        return {"error": traceback.format_exc()}
    has_package = any(name.split(".")[0] == PACKAGE for name in sys.modules)
    return {"result": variables.get("result"), "has_package": has_package}


if __name__ == "__main__":
    _serve()
