"""The command line in several processes that share its work, as `accelerate launch` starts them; one may be killed.

They are forked from a process that has imported everything: use it through [`PythonProcess`].
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence

from kandinsky_diffusers import cli, generation  # noqa: F401 (imported once, before processes are forked)


def launch(arguments: Sequence[str], processes: int, files: int = -1) -> list[int]:
    """Exit codes of processes that run `kandinsky-diffusers` with the same arguments; a signal's is negative.

    Args:
        arguments: of the command line.
        processes: how many.
        files: the first process is killed when it has so many files in their places, and the next one written but not
            yet there.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for index in range(processes):
        child = os.fork()
        if not child:
            own = {"RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ.update(shared | own if processes > 1 else {})
            _run(arguments, files if index == 0 else -1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run(arguments: Sequence[str], files: int) -> None:
    """Never returns; whatever happens, the forked process ends here."""
    code, replace = 70, os.replace
    places = iter(range(files))

    def replace_or_die(source: str, target: str) -> None:
        if files >= 0 and next(places, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    try:
        cli.app(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)
