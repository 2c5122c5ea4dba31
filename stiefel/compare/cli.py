"""The command line: ``stiefel compare``, ``report`` and ``new-problem``. Imports the rest of ``compare``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stiefel.errors import OptionError, ProblemError, StiefelError, StorageError

_USES = ("jinja2", "matplotlib", "pandas", "rich", "sklearn")
_NEEDS = "stiefel compare needs the extra 'compare': pip install 'stiefel[compare]'"
_KEPT = "Interrupted. Finished runs are kept; run the same command again to continue."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Looked up without importing: a missing extra is one line to the user, not a traceback from deep inside.
    missing = [name for name in _USES if find_spec(name) is None]
    if missing:
        print(f"{_NEEDS} (not installed: {', '.join(missing)})", file=sys.stderr)
        return 2
    try:
        return _dispatch(arguments)
    except StiefelError as error:
        print(f"stiefel: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n" + _KEPT, file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="stiefel", description="Compare orthogonality constraints on a network.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="run a comparison and report it",
        description="Run a comparison and report it. Runs that have a record already are not repeated.",
        epilog="stiefel compare FILE --help lists all options, among them one for each factor of the problem in FILE.",
    )
    compare.add_argument("file", help="a Python file that defines a problem")
    report = commands.add_parser("report", help="report existing records", description="Report the records in folders.")
    report.add_argument("folders", nargs="+", type=Path)
    report.add_argument("--html", type=Path, help="where to write the page (default: report.html in the first folder)")
    report.add_argument("--figures", type=Path, metavar="DIR", help="also write the figures as PNG, into this folder")
    new = commands.add_parser(
        "new-problem",
        help="write a problem file to start from",
        description="Write a commented problem file that runs as it is; replace its network and data with your own.",
    )
    new.add_argument("file", type=Path, help="where to write it, e.g. my_problem.py")
    # The problem's factors become options, so its file is loaded before the arguments are parsed.
    if arguments[:1] == ["compare"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        from stiefel.compare.problem.load import load_problem

        problem = load_problem(arguments[1])
        _add_options(compare, problem)
        return _compare(parser.parse_args(arguments), problem)
    parsed = parser.parse_args(arguments)
    if parsed.command == "compare":
        compare.error("the problem file comes first: stiefel compare FILE [options]")
    if parsed.command == "new-problem":
        return _new_problem(parsed.file)
    return _report(parsed.folders, parsed.html, figures=parsed.figures)


def _add_options(parser: argparse.ArgumentParser, problem: Any) -> None:
    """The comparison's own options, and one for each of the problem's factors."""
    from stiefel.compare.driver.executors import EXECUTORS
    from stiefel.compare.plan.variants import literal

    plan = parser.add_argument_group("what is compared")
    plan.add_argument("--methods", nargs="+", default=["all"], help="names, or name:option=value,... (default: all)")
    plan.add_argument(
        "--scale", nargs="+", type=literal, default=list(problem.scales), help="s in W Wᵀ = s² I; relu means √2"
    )
    plan.add_argument("--lr", nargs="+", type=_positive, help="learning rates (default: the problem's grid)")
    plan.add_argument("--budget", choices=sorted(problem.budgets), help="a set of factor values that the problem names")
    tuning = parser.add_argument_group("protocol")
    tuning.add_argument("--seeds", type=_count, default=5, help="fresh seeds for each tuned method (default 5)")
    tuning.add_argument("--tuning-seeds", type=_count, default=1, help="seeds per tuning trial (default 1)")
    tuning.add_argument(
        "--trials",
        type=_count,
        help="tuning trials of every method in every setting: first the learning rates, then the method's own knobs "
        "and rates in between (default: the problem's grid and 3 more; with --lr, those rates alone)",
    )
    tuning.add_argument("--extend", action="store_true", help="extend a grid where the best rate is on its edge")
    tuning.add_argument("--no-cost", action="store_true", help="do not measure the cost of a step")
    where = parser.add_argument_group("where and how it runs")
    where.add_argument("--out", type=Path, default=Path("runs"), help="folder for the records (default runs/)")
    where.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    where.add_argument("--jobs", type=_count, help="runs at a time (default: one per core, or per GPU)")
    where.add_argument("--processes", type=_count, default=1, help="per run, under torchrun (default 1: without it)")
    where.add_argument("--timeout", type=_positive, default=3600.0, help="limit per run in seconds (default 3600)")
    where.add_argument("--memory", type=_positive, metavar="GB", help="limit per run in 10⁹ bytes (default: none)")
    where.add_argument("--executor", choices=list(EXECUTORS), default="local", help="where runs go (default local)")
    where.add_argument(
        "--executor-options", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. address=tcp://host:8786"
    )
    where.add_argument("--retry-failed", action="store_true", help="repeat crashes, errors, timeouts, out of memory")
    where.add_argument("--dry-run", action="store_true", help="print the plan and its estimated duration, run nothing")
    # A factor named like an option of the comparison would overwrite it.
    taken = set(vars(parser.parse_args(["FILE"])))  # the names of all options so far
    group = parser.add_argument_group("factors of this problem (several values span the grid)")
    hints = typing.get_type_hints(problem)  # types, also where the file has its annotations as strings
    for f in fields(problem):
        if f.name in taken:
            raise ProblemError(
                f"{problem.__name__} has a field {f.name!r}, which is an option of the comparison; rename it"
            )
        convert = {int: int, float: float, str: str}.get(hints[f.name], literal)
        # A field made by where() says where something is: it takes one value and spans no grid.
        many: Any = {"nargs": "+"} if f.metadata.get("identity", True) else {}
        note = str(f.metadata.get("help") or f"default {problem.grid.get(f.name, _default(f))}").replace("%", "%%")
        group.add_argument("--" + f.name.replace("_", "-"), type=convert, help=note, **many)


def _default(f: Any) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive, finite number, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text}")
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
        raise ProblemError(f"{problem.__name__} fails with these factors: {type(error).__name__}: {error}") from error


def _executor_options(texts: Sequence[str]) -> dict[str, Any]:
    from stiefel.compare.plan.variants import literal

    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"--executor-options {text}: expected NAME=VALUE")
        options[name] = literal(value)
    return options


def _compare(args: argparse.Namespace, problem: Any) -> int:
    import torch

    from stiefel.compare.driver.comparison import Comparison, ExecutionOptions
    from stiefel.compare.driver.executors import engine
    from stiefel.compare.driver.runner import available_cores, writable
    from stiefel.compare.plan.plan import Plan
    from stiefel.compare.plan.variants import parse_variants

    if args.device == "cuda" and not torch.cuda.is_available() and engine(args.executor).here:
        raise OptionError("--device cuda: there is no CUDA device on this machine; use --device cpu")
    settings = {repr(sorted(s.identity().items())): s for s in _settings(args, problem)}
    rates = tuple(sorted(set(args.lr or problem.learning_rates)))
    plan = Plan(
        problem=next(iter(settings.values())).name,
        digest=problem.digest(),
        settings=tuple(s.identity() for s in settings.values()),
        variants=parse_variants(args.methods),
        scales=tuple(args.scale),
        rates=rates,
        seeds=args.seeds,
        tuning_seeds=args.tuning_seeds,
        trials=args.trials or (None if args.lr else len(rates) + 3),  # 3 for knobs and rates in between
        device=args.device,
        higher_is_better=next(iter(settings.values())).higher_is_better,
    )
    cores = available_cores()
    jobs = args.jobs or (max(1, torch.cuda.device_count()) if args.device == "cuda" else cores)
    execution = ExecutionOptions(
        file=str(Path(args.file).resolve()),
        root=args.out.resolve(),
        jobs=jobs,
        threads=max(1, cores // (jobs * args.processes)),  # per process, when all run at once
        cores=max(1, cores // args.processes),  # of a cost run, which runs alone
        timeout=args.timeout,
        memory=None if args.memory is None else int(args.memory * 1e9),  # GB to bytes
        processes=args.processes,
        executor=args.executor,
        executor_options=_executor_options(args.executor_options),
        retry_failed=args.retry_failed,
    )
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
def _report(folders: list[Path], html: Path | None, only: set[str] | None = None, figures: Path | None = None) -> int:
    from stiefel.compare.present.publish import publish
    from stiefel.compare.present.report import Report
    from stiefel.compare.record.records import BROKEN
    from stiefel.compare.record.run_folder import writing

    report = Report.read(*folders, only=only)
    path = html or folders[0] / "report.html"
    with writing(path.parent, "choose another place with stiefel report DIR --html FILE"):
        publish(report, html=path, figures=figures)
    # Scripts learn of broken runs; a method that diverged or was skipped is a result, not an error.
    return 1 if any(record.status in BROKEN for record in report.records) else 0
