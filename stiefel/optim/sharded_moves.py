"""The step of sharded weights, of which each process takes a part. Imports ``moves``, ``exchange`` and below."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.sharding import local_of
from stiefel.compat.torch_private import copy_all_, zero_all_
from stiefel.constraint import TransportMethod
from stiefel.errors import DivergenceError
from stiefel.linalg import may_wait
from stiefel.optim.bases import momentum_of
from stiefel.optim.buckets import bucket
from stiefel.optim.divergence import raise_later
from stiefel.optim.exchange import ReplicaExchange, Replicas, exchange_of, exchanged_together
from stiefel.optim.moves import Batch, Gradients, Member, Move, moves_together, note, write_momenta
from stiefel.optim.ownership import quoted

SHARED_FROM = 256
"""The rows from which on the step of a whole weight is shared: work grows with them, sending an entry does not.

Two processes on one CPU (gloo) take 1.2 to 1.4 times as long without it at 256×2304, 1.5 at 512×4608, .7 at 128×1152.
"""


class ShardedMove:
    """The step of weights that processes share, each by its owner.

    With N entries on R processes, each receives (R−1)/R² · N entries for each of: the weight, its gradient and the
    tangent part of it (these two only where the method wants that), the base's displacement, and the new weight; where
    the method carries momenta along, twice that for these. Of weights that all have whole, it receives (R−1)/R · N for
    the tangent part, the new weight, and the momentum.

    Args:
        members: the weights, sharded, or whole on every process.
        group: of the processes, where they are whole.
    """

    def __init__(self, members: Sequence[Member], group: Any = None) -> None:
        # The tangent ones last, and by the work that each is, of which the owners then get equal shares.
        self.members = sorted(members, key=lambda m: (m.tangent, work(m)))
        parameters = [m.parameter for m in self.members]
        self.exchange = exchange_of(parameters) if group is None else ReplicaExchange(parameters, group)
        self.parts = [local_of(m.parameter) for m in self.members]
        self.before = [part.clone() for part in self.parts]
        self.batches: list[tuple[list[int], Batch]] = []

    def hand_over_gradients(self, handed: Gradients) -> None:
        """Give the base optimizer the parts of each gradient's tangent part, where the method wants that."""
        gradients = [self.exchange.gradient(i) if m.tangent else None for i, m in enumerate(self.members)]
        whole = self.exchange.gather(
            [[x] if g is None else [x, g] for x, g in zip(self.before, gradients, strict=True)]
        )
        tangents: dict[int, list[Tensor]] = {i: [] for i in self.exchange.owned}
        for places in bucket(self.exchange.owned, lambda i: moves_together(self.members[i])):
            batch = Batch([self.members[i] for i in places], [whole[i][0] for i in places])
            self.batches.append((places, batch))
            if batch.tangent:
                for i, t in zip(places, batch.tangents([whole[i][1] for i in places]), strict=True):
                    tangents[i] = [t]
        if any(m.tangent for m in self.members):
            cut = self.exchange.scatter(tangents, [int(m.tangent) for m in self.members])
            for i, m in enumerate(self.members):
                if m.tangent:
                    handed.replace(m.parameter, self.exchange.joined(i, cut[i][0]))

    def free(self) -> None:
        """Let an additive base step from 0."""
        free = [part for part, m in zip(self.parts, self.members, strict=True) if m.additive]
        if free:
            zero_all_(free)

    def finish(self) -> None:
        """Let the owners move the weights; an owner's error is one on every process, so that none waits for it."""
        ends = self.exchange.gather([[part] for part in self.parts])
        moved: dict[int, list[Tensor]] = {}
        # Whether each step was taken, and whether it was not shortened: the owner writes 0 where it was not or was.
        told = torch.ones(2, len(self.members), device=self.parts[0].device)
        failure: Exception | None = None
        for places, batch in self.batches:
            try:
                results = batch.moved([ends[i][0] for i in places])
                if batch.finite is not None:
                    told[0, places] = batch.finite.float()
            except Exception as error:  # raised below, once the others know
                results, failure, told[0, places] = batch.old(), failure or error, 0
            moved |= {i: [x] for i, x in zip(places, results, strict=True)}
            for i, flag in zip(places, batch.shortened_steps(), strict=False):
                told[1, i] = 1 - torch.as_tensor(flag, dtype=told.dtype)
        cut = self.exchange.scatter(moved, [1] * len(self.members))
        copy_all_(self.parts, [parts[0] for parts in cut])
        self.told = self.exchange.agree_on_least(told)
        if failure is not None:
            raise failure
        self._raise_for_others()

    def transport(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Let the owners carry along the momenta in the base optimizer's states, where the method does that."""
        momenta: list[Tensor | None] = [None] * len(self.members)
        for i, m in enumerate(self.members):
            if isinstance(m.binding.constraint, TransportMethod):
                kept = momentum_of(states.get(m.parameter, {}), m.parameter)
                momenta[i] = None if kept is None else local_of(kept)
        if all(m is None for m in momenta):
            return
        # Sent in the weights' precision: an exchange is of one.
        whole = self.exchange.gather(
            [[] if m is None else [m.to(part)] for m, part in zip(momenta, self.parts, strict=True)]
        )
        moved: dict[int, list[Tensor]] = {i: [] for i in self.exchange.owned}
        for places, batch in self.batches:
            if batch.path is not None:
                results = batch.transported([whole[i][0] if whole[i] else None for i in places])
                moved |= {i: [value] for i, value in zip(places, results, strict=True) if whole[i]}
        cut = self.exchange.scatter(moved, [int(m is not None) for m in momenta])
        write_momenta(momenta, [c[0] if c else part for c, part in zip(cut, self.parts, strict=True)])

    def _raise_for_others(self) -> None:
        taken = self.told[0]
        if not may_wait(taken):
            raise_later(taken.all(), lambda: _failed_elsewhere(m.binding.label for m in self.members))
        elif not taken.all():
            raise DivergenceError(
                _failed_elsewhere(m.binding.label for m, ok in zip(self.members, taken, strict=True) if not ok)
            )

    def count(self) -> None:
        """Note for each weight whether its step was shortened."""
        told = self.told[1].tolist() if may_wait(self.told) else self.told[1].unbind()
        for m, flag in zip(self.members, told, strict=True):
            if getattr(m.binding.constraint, "shortens", False):  # a penalty on the step has none
                note(m.binding, flag == 0)

    def undo(self) -> None:
        """Put the weights back."""
        copy_all_(self.parts, self.before)


def _failed_elsewhere(labels: Iterable[str]) -> str:
    return (
        f"the step of weight {quoted(labels)} failed on the process that takes it, whose error says why. It was not "
        "taken, and the weight has the value from before the step"
    )


def work(member: Member) -> int:
    """About how many multiplications a method's step of a weight takes: a product with a Gram matrix, b·p²·n."""
    b, p, n = member.binding.layout.matrix_shape
    return b * p * p * n


def moves_of(members: Sequence[Member], replicas: Replicas | None = None) -> list[Move | ShardedMove]:
    """The members' steps: whole weights bucket by bucket, sharded ones by a common exchange.

    Args:
        members: the weights.
        replicas: processes with equal models, which share the work on large whole weights; None for no others.
    """
    moves: list[Move | ShardedMove] = []
    for each in bucket(members, lambda m: exchanged_together(m.parameter)):
        if exchanged_together(each[0].parameter) is not None:
            moves.append(ShardedMove(each))
            continue
        shared = [m for m in each if replicas is not None and _is_large(m) and id(m.parameter) in replicas.parameters]
        moves += [ShardedMove(same, replicas.group) for same in bucket(shared, _exchanged_alike)]  # type: ignore[union-attr]
        taken = {id(m) for m in shared}
        moves += [Move(same) for same in bucket([m for m in each if id(m) not in taken], moves_together, _parameter)]
    return moves


def _parameter(member: Member) -> Tensor:
    return member.parameter


def _exchanged_alike(member: Member) -> Hashable:
    return member.parameter.dtype, member.parameter.device


def _is_large(member: Member) -> bool:
    return member.binding.layout.matrix_shape[1] >= SHARED_FROM
