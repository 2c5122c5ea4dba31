"""The sections of the benchmark: which candidates meet which cases, and a record of every number.

Imports ``maps``, ``steps``, ``nets``, ``rounds``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from costs import nets
from costs.cases import Candidate, Case, Work
from costs.maps import PRODUCT, maps
from costs.rounds import Effort, Rounds, TooSlowError, gpu_fields, in_rounds, reason_of, wall
from costs.steps import steps
from stiefel.measure.cost.environment import environment

Record = dict[str, Any]

SHAPES = ((8, 128, 128), (8, 256, 256), (4, 512, 512), (16, 64, 576), (8, 128, 1152), (64, 16, 144), (1000, 32, 64))
ILL = 100.0
PEERS = ("geotorch", "pogo-torch", "orthogonium")

SCALED = ("own", "oni", "cayley", "SVD loop", "torch cayley", "riemannian", "pogo", "geoopt Stiefel", "pogo-torch")
"""Maps and steps that the section on scaling has."""


@dataclass(frozen=True)
class Form:
    """How much is measured: the short form, the full one, or the tiny one that only shows that all of it runs."""

    effort: Effort
    shapes: tuple[tuple[int, int, int], ...] = SHAPES
    ill: tuple[tuple[int, int, int], ...] = SHAPES
    widths: tuple[int, ...] = (128, 256, 512)
    batches: tuple[int, ...] = (256, 1024)
    convolutional: tuple[nets.Net, ...] = tuple(nets.CONVOLUTIONAL)
    methods: tuple[str, ...] = nets.RECOMMENDED
    counts: tuple[int, ...] = (1, 10, 100, 1000, 10_000)
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    rest: tuple[int, ...] = (128, 1024)
    width: int = 512
    everybody: bool = True

    def kept(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that the form has."""
        return [c for c in candidates if self.everybody or c.short]


FORMS = {
    "full": Form(Effort(rounds=40, seconds=0.6, longest=30.0, energy=3.0)),
    "short": Form(
        Effort(rounds=20, seconds=0.15, longest=2.0),
        ill=((8, 128, 128), (16, 64, 576)),
        widths=(128, 512),
        batches=(1024,),
        convolutional=(nets.CONVOLUTIONAL[0],),
        methods=("own", "riemannian", "pogo", "soft"),
        counts=(1, 10, 100, 1000),
        sizes=(16, 64, 256),
        everybody=False,
    ),
    "tiny": Form(
        Effort(rounds=3, seconds=0.01, longest=60.0),
        shapes=((2, 8, 8), (3, 4, 12)),
        ill=((3, 4, 12),),
        widths=(16,),
        batches=(8,),
        convolutional=(),
        counts=(1, 4),
        sizes=(4, 8),
        rest=(8,),
        width=16,
    ),
}


@dataclass
class Bench:
    """Runs cases one after the other and keeps the records.

    Args:
        form: what is measured.
        device, dtype: where and in what precision.
        tell: called with a line of progress as each case ends.
    """

    form: Form
    device: torch.device
    dtype: torch.dtype = torch.float32
    tell: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        peers = {f"version_{name.replace('-', '_')}": _version(name) for name in PEERS}
        self.where = environment(self.device) | peers | {"dtype": str(self.dtype).removeprefix("torch.")}

    def run(self, sections: list[str]) -> list[Record]:
        """Run sections by name; returns all records so far."""
        for name in sections:
            SECTIONS[name](self)
        return self.records

    def case(self, count: int, p: int, n: int, condition: float = 2.0) -> Case:
        """A case on this device."""
        return Case(count, p, n, condition, self.device, self.dtype)

    def compare(self, about: Record, case: Case, candidates: list[Candidate]) -> None:
        """Compare candidates on a case: set all up, then time them in rounds."""
        works: dict[str, Work] = {}
        reasons: dict[str, str] = {}
        for candidate in candidates:
            try:
                if candidate.missing:
                    raise TooSlowError(candidate.missing)
                works[candidate.name] = self._ready(candidate, case)
            except Exception as error:  # what a peer raises is its result at this case
                reasons[candidate.name] = reason_of(error)
        about = about | {"case": str(case), "count": case.count, "p": case.p, "n": case.n}
        self.measure(about, works, reasons, {c.name: c.who for c in candidates}, PRODUCT)

    def _ready(self, candidate: Candidate, case: Case) -> Work:
        """Set up a candidate; where time is proportional to the number of matrices, extrapolate from one first."""
        longest = self.form.effort.longest
        if candidate.per_layer and case.count > 1:
            alone: list[Work] = []
            setup = wall(lambda: alone.append(candidate.setup(case.alone())), self.device) * case.count
            if setup <= 2 * longest:
                wall(alone[0].call, self.device)
            call = wall(alone[0].call, self.device) * case.count if setup <= 2 * longest else 0.0
            for what, seconds, most in (("setting up", setup, 2 * longest), ("a call", call, longest)):
                if seconds > most:
                    raise TooSlowError(
                        f"{what} would take {seconds:.2g} s ({case.count} times that of one matrix), and may take "
                        f"{most:g} s"
                    )
        return candidate.setup(case)

    def measure(
        self,
        about: Record,
        works: dict[str, Work],
        reasons: dict[str, str],
        who: dict[str, str],
        unit: str,
        *,
        per_call: int = 1,
    ) -> None:
        """Time works in rounds and add a record of each.

        Args:
            about: what the records have in common.
            works: what to time, by name.
            reasons: why others cannot be.
            who: whose code each is, in the order of the records.
            unit: the work whose time is the unit of the others'.
            per_call: repetitions in a call; recorded times are those of one.
        """
        # Cases before this one leave garbage, whose collection would be timed.
        gc.collect()
        results: dict[str, Any] = reasons | in_rounds(works, self.device, self.form.effort)
        base = results[unit].median / per_call if isinstance(results.get(unit), Rounds) else None
        for name, owner in who.items():
            seconds, work = results[name], works.get(name)
            record = {**about, "candidate": name, "who": owner, "status": "timed", "reason": None}
            if isinstance(seconds, Rounds):
                spread = {k: v if k == "n" else v / per_call for k, v in asdict(seconds).items()}
                assert work is not None
                record |= {f"seconds_{k}": spread[k] for k in ("least", "median", "q1", "q3")} | {
                    "n_timed": spread["n"]
                }
                record |= {"unit": unit, "unit_seconds": base}
                record |= {f"units_{k}": spread[k] / base if base else None for k in ("median", "q1", "q3")}
                record |= {"error": work.error(), **gpu_fields(work, self.device, self.form.effort)}
            else:
                record |= {"status": "skipped", "reason": seconds}
            self.records.append(record | self.where)
        skipped = sum(isinstance(r, str) for r in results.values())
        self.tell(f"{about['section']:>8}  {about['case']}: {len(results) - skipped} timed, {skipped} skipped")


def _maps(bench: Bench) -> None:
    for shape in bench.form.shapes:
        bench.compare({"section": "maps", "condition": 2.0}, bench.case(*shape), bench.form.kept(maps()))
    for shape in bench.form.ill:
        kept = [c for c in bench.form.kept(maps()) if c.conditioned or c.name == PRODUCT]
        bench.compare({"section": "maps", "condition": ILL}, bench.case(*shape, ILL), kept)


def _steps(bench: Bench) -> None:
    for shape in bench.form.shapes:
        bench.compare({"section": "steps"}, bench.case(*shape), steps())


def _training(bench: Bench) -> None:
    for net in (*nets.nets(bench.form.widths, bench.form.batches), *bench.form.convolutional):
        names = (nets.CONTROL, *bench.form.methods)
        works = {name: nets.training(net, name, bench.device, bench.dtype) for name in names}
        reasons: dict[str, str] = {}
        if bench.device.type == "cuda":
            for name in names:
                captured = f"{name}, in a graph"
                try:
                    works[captured] = nets.in_a_graph(nets.training(net, name, bench.device, bench.dtype))
                except Exception as error:  # what forbids a capture is the result here
                    reasons[captured] = reason_of(error)
        about = {"section": "training", "case": str(net), "batch": net.batch}
        bench.measure(about, works, reasons, dict.fromkeys([*works, *reasons], "ours"), nets.CONTROL)


def _scaling(bench: Bench) -> None:
    kept = [c for c in (*maps(), *steps()[1:]) if c.name in (PRODUCT, *SCALED)]
    for along, cases in _scales(bench.form):
        for shape in cases:
            bench.compare({"section": "scaling", "along": along}, bench.case(*shape), kept)


def _scales(form: Form) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    yield "count", [(count, 16, 64) for count in form.counts]
    yield "p, n = p", [(4, p, p) for p in form.sizes]
    yield "p, n = 4p", [(4, p, 4 * p) for p in form.sizes]


def _rest(bench: Bench) -> None:
    names = dict.fromkeys(nets.AT_REST, "ours") | {"plain": "torch", "torch cayley": "torch"}
    width = bench.form.width
    for batch in bench.form.rest:
        works = {name: nets.layer_at_rest(name, width, batch, bench.device, bench.dtype) for name in names}
        case = f"layer {width}×{width}, batch {batch}"
        bench.measure({"section": "rest", "case": case, "batch": batch}, works, {}, names, "plain")
    works = {name: nets.accesses(name, width, bench.device, bench.dtype) for name in names}
    about = {"section": "rest", "case": "access of a weight"}
    bench.measure(about, works, {}, names, "plain", per_call=nets.ACCESSES)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "maps": _maps,
    "steps": _steps,
    "training": _training,
    "scaling": _scaling,
    "rest": _rest,
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
