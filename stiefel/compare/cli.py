"""The command line: ``stiefel compare FILE`` and ``stiefel report DIR``. Imports the rest of ``compare``."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from stiefel.errors import DataError, OptionError, ProblemError, StiefelError

_NEEDS = "stiefel compare needs the extra 'compare': pip install 'stiefel[compare]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import pandas  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"{_NEEDS} ({error})", file=sys.stderr)
        return 2
    try:
        return _dispatch(arguments)
    except StiefelError as error:
        print(f"stiefel: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nstopped; the runs that had ended are kept, and the same command goes on with the rest", file=sys.stderr
        )
        return 130


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="stiefel", description="Compare orthogonality constraints on a network.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="run a comparison and report it",
        description="Run a comparison; what has run is not run again.",
        epilog="stiefel compare FILE --help lists the options, and the factors of that file's problem.",
    )
    compare.add_argument("file", help="a Python file that defines a problem")
    report = commands.add_parser("report", help="report records", description="Report the records in folders.")
    report.add_argument("folders", nargs="+", type=Path)
    report.add_argument("--html", type=Path, help="where to write (default: report.html in the first folder)")
    report.add_argument("--figures", type=Path, metavar="DIR", help="write the figures as PNG too, into this folder")
    if arguments[:1] == ["compare"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        from stiefel.compare.problem import load_problem

        problem = load_problem(arguments[1])
        _add_options(compare, problem)
        return _compare(parser.parse_args(arguments), problem)
    parsed = parser.parse_args(arguments)
    if parsed.command == "compare":
        compare.error("the problem file comes first: stiefel compare FILE [options]")
    return _report(parsed.folders, parsed.html, figures=parsed.figures)


def _add_options(parser: argparse.ArgumentParser, problem: Any) -> None:
    """The comparison's own options, and one for each of the problem's factors."""
    from stiefel.compare.plan import literal

    parser.add_argument("--methods", nargs="+", default=["all"], help="names, or name:option=value,...; default: all")
    parser.add_argument("--scale", nargs="+", type=literal, default=list(problem.scales), help="scales of the weights")
    parser.add_argument("--lr", nargs="+", type=_positive, default=list(problem.learning_rates), help="learning rates")
    parser.add_argument("--seeds", type=_count, default=3, help="fresh seeds for each method's best rate (default 3)")
    parser.add_argument("--tuning-seeds", type=_count, default=1, help="seeds for each rate of the grid (default 1)")
    parser.add_argument("--budget", choices=sorted(problem.budgets), help="a named set of factors")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the records (default runs/)")
    parser.add_argument("--jobs", type=_count, default=None, help="runs at a time (default: one per core)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", type=_positive, default=3600.0, help="seconds per run (default 3600)")
    parser.add_argument("--no-cost", action="store_true", help="leave the cost pass out")
    parser.add_argument("--retry-failed", action="store_true", help="run again what ended in an error or a timeout")
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    taken = {action.dest for action in parser._actions}
    group = parser.add_argument_group("factors of this problem (several values span the grid)")
    hints = typing.get_type_hints(problem)
    for f in fields(problem):
        if f.name in taken:
            raise ProblemError(
                f"{problem.__name__} has a field {f.name!r}, which is an option of the comparison; rename it"
            )
        convert = {int: int, float: float, str: str}.get(hints[f.name], literal)
        many: Any = {"nargs": "+"} if f.metadata.get("identity", True) else {}
        note = str(f.metadata.get("help") or f"default {problem.grid.get(f.name, _default(f))}").replace("%", "%%")
        group.add_argument("--" + f.name.replace("_", "-"), type=convert, help=note, **many)


def _default(f: Any) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number ≥ 1")
    return int(text)


def _settings(args: argparse.Namespace, problem: Any) -> list[Any]:
    """One problem object per point of the grid of its factors: the command line over the budget over the default."""
    budget = problem.budgets.get(args.budget, {})
    axes = {}
    for f in fields(problem):
        given = getattr(args, f.name)
        if given is not None:
            axes[f.name] = given if isinstance(given, list) else [given]
        else:
            axes[f.name] = list(budget.get(f.name, problem.grid.get(f.name, [_default(f)])))
    try:
        return [problem(**dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())]
    except StiefelError:
        raise
    except Exception as error:
        raise ProblemError(f"{problem.__name__} refuses these factors: {type(error).__name__}: {error}") from error


def _compare(args: argparse.Namespace, problem: Any) -> int:
    import torch

    from stiefel.compare import runner
    from stiefel.compare.plan import Plan, parse_variants
    from stiefel.compare.progress import Progress

    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: there is no CUDA device on this machine; use --device cpu")
    settings = _settings(args, problem)
    by_identity = {repr(sorted(s.identity().items())): s for s in settings}
    plan = Plan(
        problem=settings[0].name,
        digest=problem.digest(),
        settings=tuple(s.identity() for s in by_identity.values()),
        variants=parse_variants(args.methods),
        scales=tuple(args.scale),
        rates=tuple(sorted(set(args.lr))),
        seeds=args.seeds,
        tuning_seeds=args.tuning_seeds,
        device=args.device,
    )
    workers = args.jobs or (runner.available_cores() if args.device == "cpu" else 1)
    threads = max(1, runner.available_cores() // workers)
    finals = len(list(plan.cells())) * plan.seeds
    costs = 0 if args.no_cost else len(plan.timed())
    print(
        f"{plan.problem}: methods {len(plan.variants)} × settings {len(plan.settings)} × scales {len(plan.scales)} × "
        f"learning rates {len(plan.rates)}\n{len(plan.tuning())} tuning runs, then {finals} with fresh seeds, "
        f"{costs} for cost; {workers} at a time\nrecords in {args.out}/"
    )
    if args.dry_run:
        return 0
    _check(settings)
    args.out.mkdir(parents=True, exist_ok=True)

    def jobs(specs: list[Any], threads: int) -> list[runner.Job]:
        return [
            runner.Job(
                spec,
                str(Path(args.file).resolve()),
                by_identity[repr(sorted(spec.fields.items()))].settings(),
                args.out,
                threads,
                args.timeout,
            )
            for spec in specs
        ]

    if args.device == "cpu":
        runner.start_server()
    start = time.monotonic()
    with Progress() as progress:

        def stage(name: str, specs: list[Any], workers: int, threads: int) -> list[Any]:
            advance = progress.stage(name, len(specs))
            return runner.run_all(jobs(specs, threads), workers, advance, retry_failed=args.retry_failed)

        tuned = stage("tuning", plan.tuning(), workers, threads)
        records = tuned + stage("final", plan.final(tuned, problem.higher_is_better), workers, threads)
        if not args.no_cost:
            cost = plan.cost()
            records += stage("cost", cost, 1, runner.available_cores())
    print(f"finished in {runner.elapsed(start)}")
    return _report([args.out], None, {record.spec.hash for record in records})


def _check(settings: list[Any]) -> None:
    """Fail before the first run where every run would: data that cannot be loaded, a model that cannot be built."""
    from stiefel.attach import constrain
    from stiefel.compare.run import load_data
    from stiefel.methods import control

    for problem in settings:
        name, step = type(problem).__name__, "make_model()"
        try:
            model = problem.make_model()
            step = "layers, exclude"
            constrain(model, control(), layers=problem.layers, exclude=problem.exclude)
            step = "make_data()"
            x, y = load_data(problem).validation
            step = "evaluate()"
            measures = problem.evaluate(model.eval(), (x[: problem.batch_size], y[: problem.batch_size]))
        except DataError:
            raise
        except Exception as error:
            raise ProblemError(f"{name}: {step} fails: {type(error).__name__}: {error}") from error
        if problem.metric not in measures:
            raise ProblemError(f"{name}.evaluate() returns {sorted(measures)}, without the metric {problem.metric!r}")


def _report(folders: list[Path], html: Path | None, only: set[str] | None = None, figures: Path | None = None) -> int:
    from rich.console import Console

    from stiefel.compare.records import read_all
    from stiefel.compare.report import failure_lines, terminal_tables, write_html, write_png
    from stiefel.compare.summary import Summary

    for folder in folders:
        if not folder.is_dir():
            raise ProblemError(
                f"there is no folder {str(folder)!r}; give a folder of records, as written by stiefel compare"
            )
    records = [r for r in read_all(folders) if only is None or r.spec.hash in only]
    if not records:
        raise ProblemError(f"no finished run in {', '.join(map(str, folders))}; run stiefel compare first")
    summary = Summary.of(records)
    console = Console()
    for table in terminal_tables(summary):
        console.print(table)
    for note in (*summary.notes, *failure_lines(summary)):
        console.print(f"· {note}", highlight=False)
    path = html or folders[0] / "report.html"
    write_html(summary, path)
    print(f"report: {path.resolve()}")
    if figures is not None:
        for written in write_png(summary, figures):
            print(f"figure: {written.resolve()}")
    failed = [r for r in records if r.status == "error"]
    return 1 if failed else 0
