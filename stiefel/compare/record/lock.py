"""Claims: the right to run a spec, so that no two processes anywhere run it at once. Imports the standard library."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from multiprocessing import reduction
from pathlib import Path
from typing import Any


class RunLock:
    """An exclusive lock on the file ``claim`` in a run's folder.

    The lock belongs to the open file, which a driver shares with the run's process. So it holds while either of them
    lives, and is free when both have ended, however they ended: a driver that is killed leaves its runs claimed until
    they finish, and a run that is killed stays claimed until its driver has recorded that. On a shared folder this
    needs a file system whose locks reach across machines, as those of NFS 4 and Lustre do.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> RunLock | None:
        """Lock a run's folder; None where another process has locked it."""
        folder.mkdir(parents=True, exist_ok=True)
        # The file is never deleted: a process with the old one open could lock that, beside the owner of a new one.
        descriptor = os.open(folder / "claim", os.O_RDWR | os.O_CREAT, 0o644)
        # flock, not lockf: POSIX record locks belong to a process, and a child does not inherit them.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        claim = cls(descriptor)
        claim.sign()
        return claim

    def sign(self) -> None:
        """Write down which process holds it, for people who look."""
        who = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, who.encode(), 0)

    def _forget_host(self) -> None:
        """Leave no name of a machine in a folder that may be handed on."""
        with contextlib.suppress(OSError, ValueError):
            who = json.loads(os.pread(self.descriptor, 4096, 0))
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, (json.dumps({"pid": who["pid"]}) + "\n").encode(), 0)

    def close(self) -> None:
        """Close this process's copy of the open file."""
        # No LOCK_UN: it would end the lock for the other process that shares the open file too.
        if self.descriptor >= 0:
            self._forget_host()
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled on the way to a child process, it shares the open file."""
        return _shared, (reduction.DupFd(self.descriptor),)


def _shared(handle: Any) -> RunLock:
    return RunLock(handle.detach())
