"""Trying a problem before its first run, in a process of its own, which its code may end. Imports ``problem``."""

from __future__ import annotations

import faulthandler
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stiefel.compare.record.run_folder import REASON, readable
from stiefel.compare.worker.job import unpacked
from stiefel.compare.worker.main import LATE, confine, named
from stiefel.compare.worker.supervise import Say, supervise
from stiefel.errors import StiefelError


def main(text: str, report: Connection, output: str) -> None:
    """Supervise the trial of a problem; what is wrong with it goes to the driver.

    Args:
        text: the file, the settings (none: the file is imported alone), and the limits, as :func:`packed` has them.
        report: where the driver reads how it ended.
        output: file for what it prints.
    """
    task = unpacked(text)
    seconds = task["timeout"] * max(1, len(task["settings"])) + LATE
    supervise(partial(_try, task), output=Path(output), report=report, seconds=seconds)


def _try(task: dict[str, Any], say: Say) -> None:
    faulthandler.enable()
    confine(task["memory"])
    try:
        faulthandler.dump_traceback_later(task["timeout"], exit=True)
        say(at=f"{task['file']}: its import")
        _check(task, say)
        say(passed=True)
    except StiefelError as error:
        say(error=[type(error).__name__, readable(str(error), REASON)])
    except BaseException as error:  # sys.exit() and KeyboardInterrupt too
        say(raised=readable(named(error), REASON))


def _check(task: dict[str, Any], say: Say) -> None:
    import torch

    from stiefel.compare.problem.load import load_problem

    torch.set_num_threads(task["threads"])
    problem = load_problem(task["file"])
    if task["settings"]:
        from stiefel.compare.problem.check import check

        for settings in task["settings"]:
            faulthandler.dump_traceback_later(task["timeout"], exit=True)  # each setting has it anew
            say(at=problem.__name__)
            check(problem(**settings), lambda what: say(at=f"{problem.__name__}: {what}"))
