"""What ``stiefel compare`` is asked for: its options, and the settings, plan and execution that they mean.

The options are those of every comparison, and one for each of the problem's factors. Imports ``driver`` and ``plan``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from stiefel.compare.driver.comparison import ExecutionOptions
from stiefel.compare.driver.executors import EXECUTORS, engine
from stiefel.compare.driver.runner import available_cores, threads_for
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import literal, parse_variants
from stiefel.errors import OptionError, ProblemError, StiefelError
from stiefel.measure.cost.accelerator import count_of, device_of, is_accelerator

STUDIES = 10
"""Replicates of a comparison where nothing else is asked for."""
MORE = 3
"""Trials beyond the grid where nothing else is asked for: for rates beyond or between, and a method's own options."""


def add_options(parser: argparse.ArgumentParser, problem: Any) -> None:
    """The options of every comparison, and one for each of the problem's factors."""
    _what(parser, problem)
    _protocol(parser)
    _where(parser)
    _factors(parser, problem)


def settings_of(args: argparse.Namespace, problem: Any) -> dict[str, Any]:
    """The problem's objects that the options ask for, by the ``repr`` of their sorted identity."""
    return {repr(sorted(point.identity().items())): point for point in _points(args, problem)}


def plan_of(args: argparse.Namespace, problem: Any, settings: Mapping[str, Any]) -> Plan:
    """The runs that the options ask for."""
    if args.studies and args.seeds:
        raise OptionError("give --studies, which tunes anew for each replicate, or --seeds, which tunes once; not both")
    rates = tuple(sorted(set(args.lr or problem.learning_rates)))
    first = next(iter(settings.values()))
    return Plan(
        problem=first.name,
        digest=problem.digest(),
        settings=tuple(point.identity() for point in settings.values()),
        variants=parse_variants(args.methods),
        scales=tuple(args.scale),
        rates=rates,
        seeds=args.seeds or 0,
        studies=0 if args.seeds else args.studies or STUDIES,
        tuning_seeds=args.tuning_seeds,
        trials=args.trials or (None if args.lr else len(rates) + MORE),
        device=device_of(args.device, here=engine(args.executor).here).type,
        higher_is_better=first.higher_is_better,
    )


def execution_of(args: argparse.Namespace) -> ExecutionOptions:
    """Where and how the options ask for the runs."""
    device = device_of(args.device, here=engine(args.executor).here)
    jobs = args.jobs or (max(1, count_of(device)) if is_accelerator(device) else available_cores())
    return ExecutionOptions(
        file=str(Path(args.file).resolve()),
        root=args.out.resolve(),
        jobs=jobs,
        threads=threads_for(jobs * args.processes),  # per process, when all run at once
        cores=threads_for(args.processes),  # of a cost run, which runs alone
        timeout=args.timeout,
        memory=_bytes(args.memory),
        processes=args.processes,
        executor=args.executor,
        executor_options=_executor_options(args.executor_options),
        retry_failed=args.retry_failed,
    )


def limits_of(options: Sequence[str]) -> tuple[float, int | None]:
    """The timeout in seconds and the memory in bytes that the options allow each process with the problem's code.

    They are needed to import its file, before the other options are known.
    """
    parser = argparse.ArgumentParser(prog="stiefel compare", add_help=False)
    _limits(parser)
    given, _ = parser.parse_known_args(options)
    return given.timeout, _bytes(given.memory)


def _limits(where: Any) -> None:
    where.add_argument("--timeout", type=_positive, default=3600.0, help="limit per run in seconds (default 3600)")
    where.add_argument("--memory", type=_positive, metavar="GB", help="limit per run in 10⁹ bytes (default: none)")


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _what(parser: argparse.ArgumentParser, problem: Any) -> None:
    plan = parser.add_argument_group("what is compared")
    plan.add_argument("--methods", nargs="+", default=["all"], help="names, or name:option=value,... (default: all)")
    plan.add_argument(
        "--scale", nargs="+", type=literal, default=list(problem.scales), help="s in W Wᵀ = s² I; relu means √2"
    )
    plan.add_argument("--lr", nargs="+", type=_positive, help="learning rates (default: the problem's grid)")
    plan.add_argument("--budget", choices=sorted(problem.budgets), help="a set of factor values that the problem names")


def _protocol(parser: argparse.ArgumentParser) -> None:
    tuning = parser.add_argument_group("protocol")
    tuning.add_argument(
        "--studies",
        type=_count,
        help="replicates, each a tuning of its own and a fresh run (default 10; a verdict needs 5)",
    )
    tuning.add_argument(
        "--seeds",
        type=_count,
        help="instead of studies, which takes less time: one tuning, its three best choices raced, and so many fresh "
        "seeds of the winner; the verdict then holds at the rates chosen",
    )
    tuning.add_argument("--tuning-seeds", type=_count, default=1, help="seeds of each trial (default 1)")
    tuning.add_argument(
        "--trials",
        type=_count,
        help="tuning budget of every method in every setting: the learning rates, then rates beyond an edge or around "
        "the best until it is known to a factor of 2, then its own knobs (default: the problem's grid and 3 more; with "
        "--lr, the rates alone)",
    )
    tuning.add_argument(
        "--extend",
        action="store_true",
        help="continue a grid on whose edge the best rate lies beyond the budget too, for all methods alike",
    )
    tuning.add_argument("--no-cost", action="store_true", help="do not measure the cost of a step")


def _where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where and how it runs")
    where.add_argument("--out", type=Path, default=Path("runs"), help="folder for the records (default runs/)")
    where.add_argument(
        "--device", default="cpu", help="what the runs train on: cpu, cuda, xpu, mps, or auto (default cpu)"
    )
    where.add_argument("--jobs", type=_count, help="runs at a time (default: one per core, or per GPU)")
    where.add_argument("--processes", type=_count, default=1, help="per run, under torchrun (default 1: without it)")
    _limits(where)
    where.add_argument("--executor", choices=list(EXECUTORS), default="local", help="where runs go (default local)")
    where.add_argument(
        "--executor-options", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. address=tcp://host:8786"
    )
    where.add_argument(
        "--retry-failed", action="store_true", help="repeat errors, crashes, kills, timeouts and out of memory"
    )
    where.add_argument("--dry-run", action="store_true", help="print the plan and its estimated duration, run nothing")


def _factors(parser: argparse.ArgumentParser, problem: Any) -> None:
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
    with contextlib.suppress(ValueError):  # argparse would name this function
        value = float(text)
        if 0 < value < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a positive, finite number, got {text}")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text}")
    return int(text)


def _points(args: argparse.Namespace, problem: Any) -> list[Any]:
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
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"--executor-options {text}: expected NAME=VALUE")
        options[name] = literal(value)
    return options
