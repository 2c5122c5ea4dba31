"""The command line: ``stiefel compare``, ``report`` and ``new-problem``. Imports the rest of ``compare``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import signal
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stiefel.errors import ProblemError, StiefelError, StorageError

_USES = ("jinja2", "matplotlib", "pandas", "rich", "sklearn")
_NEEDS = "stiefel compare needs the extra 'compare': pip install 'stiefel[compare]'"
_KEPT = "Finished runs are kept; run the same command again to continue."
FAILED, IMPOSSIBLE, SIGNAL = 3, 2, 128
"""Exit statuses: some runs failed; the command could not be carried out; and what a signal's number is added to."""
_STATUSES = (
    "exit status: 0 all runs ended; 3 some failed (error, crashed, killed, out of memory, timeout); 2 the command "
    "could not be carried out; 130, 143, 129 interrupted by Ctrl-C, SIGTERM, SIGHUP: finished runs are kept"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 lacks √ and ‖, and is told all the same
    # Looked up without importing: a missing extra is one line to the user, not a traceback from deep inside.
    missing = [name for name in _USES if find_spec(name) is None]
    if missing:
        print(f"{_NEEDS} (not installed: {', '.join(missing)})", file=sys.stderr)
        return IMPOSSIBLE
    from stiefel.compare.driver import interruption

    try:
        with interruption.raising():
            return _dispatch(arguments)
    except StiefelError as error:
        print(f"stiefel: {type(error).__name__}: {error}", file=sys.stderr)
        return IMPOSSIBLE
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, interruption.Interrupted) else signal.SIGINT
        what = "Interrupted" if number == signal.SIGINT else f"Ended by {signal.Signals(number).name}"
        print(f"\n{what}. {_KEPT}", file=sys.stderr)
        return SIGNAL + number  # as a shell reports it


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="stiefel", description="Compare orthogonality constraints on a network.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="run a comparison and report it",
        description="Run a comparison and report it. Runs that have a record already are not repeated.",
        epilog="stiefel compare FILE --help lists all options, among them one for each factor of the problem in FILE; "
        + _STATUSES,
    )
    compare.add_argument("file", help="a Python file that defines a problem")
    report = commands.add_parser(
        "report", help="report existing records", description="Report the records in folders.", epilog=_STATUSES
    )
    report.add_argument("folders", nargs="+", type=Path, help="folders of records, as stiefel compare --out names them")
    report.add_argument("--html", type=Path, help="where to write the page (default: report.html in the first folder)")
    report.add_argument("--figures", type=Path, metavar="DIR", help="also write the figures as PNG, into this folder")
    report.add_argument("--open", action="store_true", help="show the page in the web browser")
    new = commands.add_parser(
        "new-problem",
        help="write a problem file to start from",
        description="Write a commented problem file that runs as it is; replace its network and data with your own.",
    )
    new.add_argument("file", type=Path, help="where to write it, e.g. my_problem.py")
    # The problem's factors become options, so its file is loaded before the arguments are parsed.
    if arguments[:1] == ["compare"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        problem = _problem(arguments[1], arguments[2:])
        from stiefel.compare.arguments import add_options

        add_options(compare, problem)
        return _compare(parser.parse_args(arguments), problem)
    parsed = parser.parse_args(arguments)
    if parsed.command == "compare":
        compare.error("the problem file comes first: stiefel compare FILE [options]")
    if parsed.command == "new-problem":
        return _new_problem(parsed.file)
    return _report(parsed.folders, parsed.html, figures=parsed.figures, show=parsed.open)


def _problem(file: str, options: list[str]) -> Any:
    """The class of a problem, whose file is first imported in another process: its code may end that, or never return.

    Args:
        file: its path.
        options: of the command line, of which the limits of that process are read.
    """
    from stiefel.compare.driver import process, trial

    if Path(file).is_file():
        process.start_server()  # its imports take as long as those below
        from stiefel.compare.arguments import limits_of

        timeout, memory = limits_of(options)
        trial.attempt(file, timeout=timeout, memory=memory)
    from stiefel.compare.problem.load import load_problem

    return load_problem(file)


def _compare(args: argparse.Namespace, problem: Any) -> int:
    from stiefel.compare.arguments import execution_of, plan_of, settings_of
    from stiefel.compare.driver.comparison import Comparison
    from stiefel.compare.driver.runner import writable

    settings = settings_of(args, problem)
    plan, execution = plan_of(args, problem, settings), execution_of(args)
    comparison = Comparison(plan, settings, execution, cost=not args.no_cost, extend=args.extend)
    print(comparison.describe(args.out))
    if args.dry_run:
        print(comparison.estimate())
        return 0
    comparison.check()
    writable(args.out)
    records = comparison.run()
    return _report([args.out], None, {record.spec.hash for record in records})


def _new_problem(path: Path) -> int:
    """Write the template."""
    source = (Path(__file__).parent / "problem" / "template.py").read_text(encoding="utf-8")
    if path.suffix != ".py":
        raise ProblemError(f"{path} must end in .py: a problem is a Python file")
    try:
        with path.open("x", encoding="utf-8") as stream:  # never over a file that is there
            # FILE stands in its usage lines; the noqa mark is for the linter of this repository.
            stream.write(source.replace("FILE", path.name).replace("  # noqa: RUF012", ""))
    except FileExistsError as error:
        raise ProblemError(f"{path} exists already; give another name, or delete it first") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; give another folder") from error
    print(f"wrote {path}: it runs as it is, with stiefel compare {path}")
    return 0


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Collect garbage rarely: a report keeps nearly all that it makes, and collection took a fifth of its time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@_rarely_collected()
def _report(
    folders: list[Path],
    html: Path | None,
    only: set[str] | None = None,
    figures: Path | None = None,
    show: bool = False,
) -> int:
    from stiefel.compare.present.publish import publish
    from stiefel.compare.present.report import Report
    from stiefel.compare.record.records import BROKEN
    from stiefel.compare.record.run_folder import writing

    report = Report.read(*folders, only=only)
    path = html or folders[0] / "report.html"
    with writing(path.parent, "choose another place with stiefel report DIR --html FILE"):
        publish(report, html=path, figures=figures)
    if show and not webbrowser.open(path.resolve().as_uri()):
        print(f"no web browser was found; open {path} in one", file=sys.stderr)
    # Scripts learn of broken runs; a method that diverged or was skipped is a result, not an error.
    return FAILED if any(record.status in BROKEN for record in report.records) else 0
