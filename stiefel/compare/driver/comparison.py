"""A comparison from its plan to its records: tuning, extension, refinement, fresh seeds, cost. Imports ``runner``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stiefel.compare.driver import estimate, executors, runner, trial
from stiefel.compare.driver.process import start_server
from stiefel.compare.driver.progress import Progress, duration, elapsed
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import label_of
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.records import BROKEN, Record, read_all
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.job import Job
from stiefel.constraint import control


@dataclass(frozen=True)
class ExecutionOptions:
    """Where and how a comparison runs: nothing here changes its results, except times.

    Args:
        file: the problem's file.
        root: folder of the records.
        jobs: runs at a time.
        threads: of each of them.
        cores: threads of a cost run, which has the machine to itself.
        timeout: of a run, in seconds.
        memory: bytes that a run may allocate, or None.
        processes: of a run, under torchrun.
        executor: what runs them, by name.
        executor_options: options of the executor.
        retry_failed: run again what failed for reasons that may lie outside the method.
    """

    file: str
    root: Path
    jobs: int
    threads: int
    cores: int
    timeout: float
    memory: int | None = None
    processes: int = 1
    executor: str = "local"
    executor_options: dict[str, Any] = field(default_factory=dict)
    retry_failed: bool = False

    @property
    def forked(self) -> bool:
        """Whether training runs on the CPU are forked from a server here, which has imported all."""
        return self.processes == 1 and executors.engine(self.executor).here


@dataclass(frozen=True)
class Comparison:
    """A plan, and how it is carried out.

    Args:
        plan: what is run.
        settings: the problem's objects, by the ``repr`` of their sorted identity.
        execution: where and how.
        cost: whether the cost of a step is measured.
        extend: whether grids on whose edge a winner lies are continued.
    """

    plan: Plan
    settings: Mapping[str, Problem]
    execution: ExecutionOptions
    cost: bool = True
    extend: bool = False

    def check(self) -> None:
        """Try each setting's problem once, in another process, so that a broken one fails before the first run.

        Raises:
            ProblemError: as :func:`stiefel.compare.driver.trial.attempt`, also for DataError.
        """
        execution = self.execution
        trial.attempt(
            execution.file,
            [problem.settings() for problem in self.settings.values()],
            timeout=execution.timeout,
            memory=execution.memory,
            threads=execution.threads,
        )

    def describe(self, out: Path) -> str:
        """The plan in words."""
        plan, execution = self.plan, self.execution
        # A cell is one method in one setting at one scale; every cell has the same tuning budget.
        cells = len(list(plan.cells()))
        each, costs = plan.trials or len(plan.rates), len(plan.timed()) if self.cost else 0
        trials = cells * each * plan.tuning_seeds
        beyond = ", and what the grid is continued by" if self.extend else ""
        if plan.studies:
            design, reported = f"{plan.studies} studies", f"then {cells} runs at what each chose"
        else:
            design, reported = "one tuning", f"then {cells * plan.seeds} with fresh seeds at the best of a race"
        where = "" if executors.engine(execution.executor).here else f" by {execution.executor}"
        threads = f"{execution.threads} {'thread' if execution.threads == 1 else 'threads'}"
        lines = [
            f"{plan.problem}: methods {len(plan.variants)} × settings {len(plan.settings)} × scales {len(plan.scales)}",
            f"{design}: {trials} tuning runs ({len(plan.rates)} learning rates, {each} trials each){beyond}, "
            f"{reported}, {costs} cost runs",
            f"{execution.jobs} at a time{where}, {threads} each; records in {out}/",
        ]
        return "\n".join(lines)

    def estimate(self) -> str:
        """How long the whole comparison and the rest of it may take, judged by runs of this problem that have ended."""
        plan, execution = self.plan, self.execution
        # Only runs of the same code on the same kind of device show how long the next ones take.
        records = {
            record.spec.hash: record
            for record in (read_all([execution.root])[0] if execution.root.is_dir() else [])
            if (record.spec.problem, record.spec.digest, record.spec.device) == (plan.problem, plan.digest, plan.device)
        }
        pace = estimate.Pace(records.values(), forked=execution.forked)
        if not pace.quality:
            return "no estimate yet: it is based on finished runs of this problem, and the records folder has none"
        # Records that --retry-failed replaces still show the pace, but their runs are yet to come.
        valid = {k: r for k, r in records.items() if not (execution.retry_failed and r.status in BROKEN)}
        left = estimate.left(plan, valid, cost=self.cost, extend=self.extend)
        whole = pace.seconds(estimate.whole(plan, cost=self.cost), execution.jobs)
        rest = f"about {duration(pace.seconds(left, execution.jobs))} left" if left else "nothing left"
        return f"from scratch about {duration(whole)}, {rest}; estimated from {pace.ended} finished training runs"

    def run(self) -> list[Record]:
        """Run what is missing, stage by stage; returns the records of all."""
        plan, execution = self.plan, self.execution
        if plan.device == "cpu" and execution.forked:
            start_server()  # remote workers and CUDA runs start new interpreters and need none
        start = time.monotonic()
        known: dict[str, Record] = {}
        with (
            executors.make(
                execution.executor,
                execution.jobs,
                threads=execution.threads,
                folder=execution.root,
                device=plan.device,
                options=execution.executor_options,
            ) as executor,
            Progress(lambda: self._left(known)) as progress,
        ):

            def stage(name: str, specs: Sequence[RunSpec], *, alone: bool = False) -> list[Record]:
                jobs = [self._job(spec, execution.cores if alone else execution.threads) for spec in specs]
                advance = progress.stage(name, len(jobs))
                found = []

                def note(record: Record) -> None:
                    known[record.spec.hash] = record
                    advance(record)

                # Cost runs go one by one: a run beside them would distort the times.
                for batch in [[job] for job in jobs] if alone else [jobs]:
                    found += runner.run_all(batch, executor, note, retry_failed=execution.retry_failed)
                return found

            tuned = plan.tuned(stage("tuning", plan.tuning()))
            # Each step may move the winners, and with them what is tried next.
            while more := plan.following(tuned, extend=self.extend):
                tuned += stage(*more)
            # A winner was selected by its tuning score, which is therefore biased: only fresh seeds are reported.
            records = [*tuned.records, *stage("final", plan.final(tuned))]
            if self.cost:
                records += stage("cost", plan.cost(tuned), alone=True)
        print(f"{len(records)} runs finished in {elapsed(start)}")
        return records

    def _left(self, known: Mapping[str, Record]) -> float | None:
        """The seconds that the rest may take, judged by the runs that have ended."""
        pace = estimate.Pace(known.values(), lambda module: estimate.STARTS, forked=self.execution.forked)
        if not pace.quality:
            return None
        rest = estimate.left(self.plan, known, cost=self.cost, extend=self.extend)
        return pace.seconds(rest, self.execution.jobs)

    def _job(self, spec: RunSpec, threads: int) -> Job:
        execution = self.execution
        # A spec has the factors alone; the settings also hold the fields that say where something is (a data folder).
        return Job(
            spec=spec,
            file=execution.file,
            settings=self.settings[repr(sorted(spec.fields.items()))].settings(),
            root=execution.root,
            threads=threads,
            timeout=execution.timeout,
            memory=execution.memory,
            processes=execution.processes,
            label=label_of(spec),
            control=spec.method == control(),
        )
