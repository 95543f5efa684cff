"""Runs the library on hostile input in a forked process, and tells what it did there.

A case is a target and a seed, from which its input is made; the same seed makes the same input. After each case the
process tells how it ended. What it may not do is told as a fault: to raise anything but the documented errors, to die,
to take too long or too much memory, to run a program, to connect, to import what the input names, to touch files
outside the folder of the case, and, where it has refused the input, to leave anything behind.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


SECONDS = 20  # of CPU time, for a case
MEMORY = 1024  # MiB, which a case may take beside what the process has
ADDRESSES = 4096  # MiB of them, so that a fault does not take the machine's memory
WAIT = 300  # seconds without an answer, where a process does nothing at all
CANARY = "fuzz_canary"  # a module and a command that hostile input names

RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "subprocess.Popen", "pty.spawn")
CONNECTS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")
CHANGES = (  # an argument of these is a path
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
)


@dataclass(frozen=True)
class Target:
    """A part of the library that reads something of unknown origin.

    Args:
        name: of the target.
        make: writes the input for a source of random numbers into the folder ``in`` of a case, and returns what is to
            be done with it; output goes to ``out``.
        errors: what may be raised.
    """

    name: str
    make: Callable[[random.Random, Path], Callable[[], Any]]
    errors: tuple[type[Exception], ...]


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        target: its name.
        seed: of the case.
        result: ``accepted``, ``refused`` or ``fault``.
        said: the error or the fault.
        seconds: of CPU time.
        memory: MiB that were taken at most, beside those of the process before.
    """

    target: str
    seed: int
    result: str
    said: str = ""
    seconds: float = 0.0
    memory: float = 0.0


def written(path: Path, content: bytes) -> Path:
    """A file with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def run_cases(cases: Iterable[tuple[Target, int]], folder: Path) -> Iterator[Outcome]:
    """Run cases, each batch in a process that lives until a case kills it."""
    waiting = list(cases)
    while waiting:
        done = 0
        for outcome in _run_in_a_process(waiting, folder):
            done += 1
            yield outcome
        waiting = waiting[max(done, 1) :]


def _run_in_a_process(cases: list[tuple[Target, int]], folder: Path) -> Iterator[Outcome]:
    """Outcomes as they come; the last one is a fault if the process has died of it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; those of torch are idle
        child = os.fork()
    if child == 0:
        os.close(reading)
        _serve(cases, folder, writing)
    os.close(writing)
    done = 0
    with open(reading, encoding="utf-8") as answers:
        while select.select([answers], [], [], WAIT)[0] and (line := answers.readline()):
            done += 1
            yield Outcome(**json.loads(line))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if done < len(cases):
        target, seed = cases[done]
        code = os.waitstatus_to_exitcode(status)
        how = {-signal.SIGXCPU: f"more than {SECONDS} s of CPU time", -signal.SIGKILL: f"no answer in {WAIT} s"}
        yield Outcome(target.name, seed, "fault", how.get(code, f"the process ended with {code}"))


def _serve(cases: list[tuple[Target, int]], folder: Path, answers: int) -> None:
    """Run all cases, and end the process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    guard = _Guard(folder)
    sys.addaudithook(guard)
    os.chdir(folder)
    most = int(_memory("VmSize") + ADDRESSES) << 20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.unraisablehook = lambda error: None
    try:
        for target, seed in cases:
            outcome = run_case(target, seed, folder / "case", guard)
            os.write(answers, (json.dumps(asdict(outcome)) + "\n").encode())
        os._exit(0)
    except BaseException:  # noqa: BLE001 (it is told below; the parent's tests must not go on here)
        os.write(answers, (json.dumps(asdict(Outcome("harness", 0, "fault", traceback.format_exc()))) + "\n").encode())
    os._exit(1)


def run_case(target: Target, seed: int, case: Path, guard: _Guard) -> Outcome:
    """Run one case in a fresh folder."""
    shutil.rmtree(case, ignore_errors=True)
    for name in ("in", "tmp", "outside"):
        (case / name).mkdir(parents=True)
    (case / "outside" / "keep.txt").write_text("keep me")
    tempfile.tempdir = str(case / "tmp")
    act = target.make(random.Random(f"{target.name} {seed}"), case)
    before, memory = _listing(case), _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    started = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(started) + SECONDS + 1, hard))
    result, said = "accepted", ""
    with guard:
        try:
            act()
        except target.errors as error:
            result, said = "refused", f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 (that is what is looked for)
            frames = traceback.format_list(traceback.extract_tb(error.__traceback__))[-3:]
            result, said = "fault", f"{type(error).__name__}: {error}\n{''.join(frames)}"
    seconds, memory = time.process_time() - started, _memory("VmHWM") - memory
    faults = [*guard.faults, *_left_behind(before, _listing(case), result)]
    if memory > MEMORY:
        faults.append(f"{memory:.0f} MiB of memory")
    if faults and result != "fault":
        result, said = "fault", "; ".join(faults)
    return Outcome(target.name, seed, result, said[:2000], seconds, memory)


def _left_behind(before: dict[str, Any], after: dict[str, Any], result: str) -> list[str]:
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if result == "accepted":
        changed = {name for name in changed if name.split("/")[0] != "out"}
    return [f"changed {name}" for name in sorted(changed)[:5]]


def _listing(folder: Path) -> dict[str, Any]:
    """What is in a folder, without following links."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            facts = path.lstat()
            content = (facts.st_size, facts.st_mtime_ns) if path.is_file() and not path.is_symlink() else ()
            found[path.relative_to(folder).as_posix()] = (facts.st_mode, *content)
    return found


def _memory(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


class _Guard:
    """An audit hook that notes, while it is entered, what reading a file must not do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._active = False
        self.faults: list[str] = []

    def __enter__(self) -> None:
        self.faults = []
        self._active = True

    def __exit__(self, *error: object) -> None:
        self._active = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event in RUNS_CODE or event in CONNECTS or (event == "import" and CANARY in arguments[0]):
            self.faults.append(f"{event} {arguments}"[:200])
        elif event == "open" and self._writes(arguments):
            self._check(event, arguments[0])
        elif event in CHANGES:
            folder = next((a for a in arguments[1:] if type(a) is int and a > 2 and event != "os.chmod"), None)
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(event, path, folder)

    def _writes(self, arguments: tuple[Any, ...]) -> bool:
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _check(self, event: str, path: Any, folder: int | None = None) -> None:
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        if folder is not None and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        real = Path(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        if not real.is_relative_to(self._folder) and str(real) != os.devnull:
            self.faults.append(f"{event} {name}")
