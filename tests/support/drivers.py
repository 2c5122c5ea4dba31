"""Drivers of comparisons that start at once: forked from a process that has imported all, and has a server of runs.

A new interpreter takes seconds, and 200 faults take two drivers each. What a driver does is the same, but that its
server of runs outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import stiefel

_PATH = os.pathsep.join([str(Path(stiefel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
_ENVIRONMENT = {**os.environ, "PYTHONPATH": _PATH}  # of the code that is tested, whatever the working folder


class Driver:
    """A ``stiefel`` command under way; ``pid`` may be sent signals."""

    def __init__(self, host: Host | None, arguments: list[str], folder: Path) -> None:
        self.log = folder / f"driver-{time.monotonic_ns()}.log"
        self._host, self._process = host, None
        if host is not None:
            self.pid = host.ask({"arguments": arguments, "log": str(self.log)})
        else:
            with self.log.open("w") as log:
                command = [sys.executable, "-m", "stiefel", *arguments]
                self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=_ENVIRONMENT)
            self.pid = self._process.pid

    def ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a zombie has ended
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    def wait(self, seconds: float = 120) -> int:
        """Its exit status; negative is a signal."""
        limit = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < limit, f"the driver does not end:\n{self.said()}"
            time.sleep(0.01)
        return self._process.wait() if self._process is not None else self._host.ask({"wait": self.pid})

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Host:
    """The process that drivers are forked from, in a working folder by which all that comes of it is found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=_ENVIRONMENT,
        )
        assert self._process.stdout.readline() == "ready\n"
        self._own = self.processes()

    def ask(self, task: dict) -> int:
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def driver(self, arguments: list[str], folder: Path) -> Driver:
        return Driver(self, arguments, folder)

    def processes(self) -> set[int]:
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _folder(pid) == str(self.folder)}

    def left_over(self, seconds: float = 5.0) -> set[int]:
        """Processes that are still there after some seconds, beside the host and its servers."""
        limit = time.monotonic() + seconds
        while (left := self.processes() - self._own) and time.monotonic() < limit:
            time.sleep(0.02)
        return left

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def _folder(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd")
    return ""


def _nothing() -> None:
    pass


def _serve() -> None:
    import multiprocessing.forkserver as server

    from stiefel.compare import arguments, cli  # noqa: F401
    from stiefel.compare.driver import process
    from stiefel.compare.present import publish, report  # noqa: F401

    process.start_server()
    warm = process._context().Process(target=_nothing)
    warm.start()
    warm.join()
    # A forked driver is not the parent of the server, and may not ask whether that runs.
    server.ensure_running = server._forkserver.ensure_running = lambda: None
    replies = os.fdopen(os.dup(1), "w")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _drive(cli.main, **task)
        print(answer, file=replies, flush=True)


def _drive(main, arguments: list[str], log: str) -> None:
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
