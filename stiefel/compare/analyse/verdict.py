"""The verdict on a problem: what can be told apart.

One verdict over all settings × replicates: a table of winners per setting would name one by luck in every other row.
Imports ``candidates``, ``statistics`` and ``summary``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stiefel.compare.analyse.candidates import Candidate, candidates
from stiefel.compare.analyse.statistics.differences import Difference, detectable, family
from stiefel.compare.analyse.statistics.scores import ENOUGH
from stiefel.compare.analyse.summary import Summary


@dataclass(frozen=True)
class Comparison:
    """Two candidates, and whether they are told apart; ``difference`` is the first's score less the second's.

    On a log scale it is the ratio of their scores.
    """

    first: Candidate
    second: Candidate
    difference: Difference

    @property
    def is_ratio(self) -> bool:
        """Whether ratios are compared, because the metric spans decades."""
        return self.difference.ratio

    @property
    def against_control(self) -> bool:
        """Whether it is of the first family: everything against no constraint."""
        return self.second.control

    def seen_from(self, candidate: Candidate) -> Comparison:
        """The same, with this candidate first."""
        if candidate is self.first:
            return self
        return Comparison(self.second, self.first, self.difference.turned)

    @property
    def better(self) -> bool:
        """Whether the first is told apart from the second and has the better score."""
        neutral = 1.0 if self.is_ratio else 0.0
        return bool(self.difference.apart) and self.first.metric.better(self.difference.value - neutral) > 0


@dataclass(frozen=True)
class Verdict:
    """The verdict on one problem, over all its settings.

    Family 1 is every candidate against every control; family 2 all other pairs. In each, the probability of any false
    "told apart" is 5 %.
    """

    summary: Summary

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What has a score, best first; baselines with known faults are left out."""
        found = [c for c in candidates(self.summary) if c.trained and not c.faulty]
        return sorted(found, key=lambda c: (-c.metric.better(c.score.value if c.score else math.nan), c.name))

    @cached_property
    def left_out(self) -> dict[str, str]:
        """What was run and is no candidate, with the reason: by failures, or because it is not at every point."""
        known = {c.label for c in self.candidates}
        found: dict[str, str] = {}
        for row in (row for setting in self.summary.settings for row in setting.rows):
            if row.label not in known and not row.faults:
                whole = "was not run in every setting" if row.test else row.state
                found[row.label] = found.get(row.label) or row.state or whole
        return found

    @property
    def controls(self) -> list[Candidate]:
        """The candidates without a constraint, best first."""
        return [c for c in self.candidates if c.control]

    @property
    def constrained(self) -> list[Candidate]:
        """The other candidates, best first."""
        return [c for c in self.candidates if not c.control]

    @property
    def control(self) -> Candidate | None:
        """What stands for no constraint: an orthogonal start alone where it was run, else the network as it is."""
        return next((c for c in self.controls if any(row.scaled for row in c.rows)), next(iter(self.controls), None))

    def place(self, candidate: Candidate) -> tuple[int, int]:
        """The best and the worst place that a candidate may have: others told apart from it are above or below."""
        others = [c for c in self.candidates if c is not candidate]
        above = sum(self.between(c, candidate).better for c in others)
        below = sum(self.between(candidate, c).better for c in others)
        return 1 + above, len(self.candidates) - below

    @property
    def title(self) -> str:
        """The settings that it is about."""
        settings = self.summary.settings
        return settings[0].title if len(settings) == 1 else "all settings"

    @property
    def n(self) -> int:
        """Replicates of most candidates."""
        counts = Counter(len(c.scores) for c in self.candidates)
        return max(counts, key=lambda n: (counts[n], n), default=0)

    @property
    def decides(self) -> bool:
        """Whether anything was compared with a control, or with anything where there is none."""
        found = [c for c in self.comparisons if c.against_control] or self.comparisons
        if not found:  # a single candidate
            return self.n >= ENOUGH
        return any(c.difference.apart is not None for c in found)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every pair once: those with a control first, the control second."""
        ordered = [
            (b, a) if a.control and not b.control else (a, b) for a, b in itertools.combinations(self.candidates, 2)
        ]
        first = [(a, b) for a, b in ordered if b.control]
        found = [Comparison(a, b, d) for (a, b), d in zip(first, self._family(first), strict=True)]
        # The second family is of all pairs, because which is the best was not known before.
        for (a, b), d in zip(ordered, self._family(ordered), strict=True):
            if not b.control:
                found.append(Comparison(a, b, d))
        return found

    def between(self, first: Candidate, second: Candidate) -> Comparison:
        """The comparison of two candidates, seen from the first."""
        return self._by_pair[frozenset((id(first), id(second)))].seen_from(first)

    def rivals(self, best: Candidate, among: Iterable[Candidate]) -> tuple[Candidate, ...]:
        """Those that cannot be told from a candidate by their scores; also all of which too few runs are known."""
        return tuple(c for c in among if c is not best and not self.between(best, c).difference.apart)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of a replicate, pooled over candidates, in the metric or its logarithm."""
        known = [c.sample.spread for c in self.candidates if c.sample.n > 1]
        return math.sqrt(float(np.mean(np.square(known)))) if known else math.nan

    @property
    def detectable(self) -> float | None:
        """The smallest difference from a control that this design finds with probability .8; None where n is small."""
        pairs = sum(c.against_control for c in self.comparisons) or len(self.comparisons)
        return detectable(self.spread, self.n, pairs) if pairs and self.n >= ENOUGH else None

    def _family(self, pairs: Sequence[tuple[Candidate, Candidate]]) -> list[Difference]:
        found = family([(a.sample, b.sample) for a, b in pairs])
        logs = [a.log_scale and b.log_scale for a, b in pairs]
        return [d.exponential if log else d for d, log in zip(found, logs, strict=True)]

    @cached_property
    def _by_pair(self) -> dict[frozenset[int], Comparison]:
        return {frozenset((id(c.first), id(c.second))): c for c in self.comparisons}
