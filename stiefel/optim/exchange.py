"""Whole matrices of sharded weights, each at one process, and back.

A method's step needs whole matrices; optimizers that act entry by entry, and their states, do not, and stay sharded.
With N entries in all, on R processes, weight j belongs to process j mod R, and one all-to-all carries what is asked for
of all weights at once: (R−1)/R² · N entries received by each, and each process computes 1/R of the steps. An all-gather
would bring every process (R−1)/R · N entries, and all the work.

Imports ``compat`` and ``buckets``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stiefel.compat.sharding import agree_on_least, is_sharded, like, local_of, local_part, shard_dimension, whole
from stiefel.optim.buckets import dense, laid_out_as


def exchanged_together(parameter: Tensor) -> Hashable:
    """What parameters have in common that one exchange serves; None for those that are not sharded."""
    if not is_sharded(parameter):
        return None
    cut = shard_dimension(parameter)
    return parameter.device_mesh, cut and cut[0], parameter.dtype, parameter.device  # type: ignore[attr-defined]


def exchange_of(parameters: Sequence[Any]) -> Exchange:
    """The exchange for sharded parameters that are cut over one dimension of a mesh, or in other ways."""
    return Exchange(parameters) if shard_dimension(parameters[0]) is None else OwnerExchange(parameters)


class Exchange:
    """Every process gets the whole of every weight: for weights that are cut in more than one way.

    Args:
        parameters: sharded, of one mesh, precision and device.
    """

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters = parameters
        self.owned: Sequence[int] = range(len(parameters))
        """Places, in ``parameters``, of the weights whose steps are this process's work."""

    def gradient(self, i: int) -> Tensor:
        """This process's part of a parameter's gradient, which may still be a sum that is spread over processes."""
        parameter = self.parameters[i]
        return local_of(parameter.grad.redistribute(placements=parameter.placements))

    def joined(self, i: int, part: Tensor) -> Tensor:
        """The tensor of which each process has such a part, cut as a parameter is."""
        return like(part.contiguous(), self.parameters[i])

    def agree_on_least(self, values: Tensor) -> Tensor:
        """The least of each of ``values`` over all processes."""
        return agree_on_least(values, self.parameters[0])

    def gather(self, parts: Sequence[Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        """The wholes of tensors that are cut as the weights are.

        Args:
            parts: this process's parts of some tensors for each weight; equally many on every process.

        Returns:
            The whole tensors of each weight that is owned, by its place.
        """
        return {i: [whole(like(part, self.parameters[i])) for part in parts[i]] for i in self.owned}

    def scatter(self, wholes: Mapping[int, Sequence[Tensor]], counts: Sequence[int]) -> list[list[Tensor]]:
        """The inverse of :meth:`gather`: this process's parts of what the owners have computed.

        Args:
            wholes: some whole tensors of each weight that is owned.
            counts: how many there are of each weight.
        """
        return [[local_part(value, p) for value in wholes[i]] for i, p in enumerate(self.parameters)]


class OwnerExchange(Exchange):
    """One process gets the whole of a weight: for weights that are cut along one dimension of a mesh."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        super().__init__(parameters)
        cuts = [cut for p in parameters if (cut := shard_dimension(p)) is not None]
        mesh, self.dims = parameters[0].device_mesh, [dim for _, dim in cuts]
        self.device = torch.device(mesh.device_type)  # where parts that are kept on the host travel
        self._divide(mesh.get_group(cuts[0][0]), mesh.get_local_rank(cuts[0][0]))

    def _divide(self, group: Any, rank: int) -> None:
        self.group, self.size, self.rank = group, torch.distributed.get_world_size(group), rank
        self.owned = self._owned_by(self.rank)

    def gather(self, parts: Sequence[Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        """One all-to-all, to the owners."""
        counts = [len(part) for part in parts]
        sent = [self._flat([t for i in self._owned_by(r) for t in parts[i]]) for r in range(self.size)]
        received = self._all_to_all(sent, self._entries_to_owner(counts))
        pieces: dict[int, list[list[Tensor]]] = {i: [[] for _ in range(counts[i])] for i in self.owned}
        for rank, flat in enumerate(received):
            shapes = [self._part_shape(i, rank) for i in self.owned for _ in range(counts[i])]
            cut = iter(self._cut(flat, shapes))
            for i in self.owned:
                for k in range(counts[i]):
                    pieces[i][k].append(next(cut))
        return {i: [torch.cat(p, dim=self.dims[i]) for p in pieces[i]] for i in self.owned}

    def scatter(self, wholes: Mapping[int, Sequence[Tensor]], counts: Sequence[int]) -> list[list[Tensor]]:
        """One all-to-all, from the owners."""
        sent = [
            self._flat([self._part(i, rank, t) for i in self.owned for t in wholes[i]]) for rank in range(self.size)
        ]
        received = self._all_to_all(sent, self._entries_from_owners(counts))
        result: list[list[Tensor]] = [[] for _ in self.parameters]
        for rank, flat in enumerate(received):
            owned = self._owned_by(rank)
            shapes = [self._part_shape(i, self.rank) for i in owned for _ in range(counts[i])]
            cut = iter(self._cut(flat, shapes))
            for i in owned:
                result[i] = [next(cut).to(self.parameters[i].device) for _ in range(counts[i])]
        return result

    def _owned_by(self, rank: int) -> range:
        return range(rank, len(self.parameters), self.size)

    def _part_shape(self, i: int, rank: int) -> tuple[int, ...]:
        """The shape of a process's part: as ``torch.chunk`` cuts, so that the last parts may be short or empty."""
        shape, dim = list(self.parameters[i].shape), self.dims[i]
        chunk = -(-shape[dim] // self.size)
        shape[dim] = max(0, min(chunk, shape[dim] - rank * chunk))
        return tuple(shape)

    def _part(self, i: int, rank: int, value: Tensor) -> Tensor:
        dim, length = self.dims[i], self._part_shape(i, rank)[self.dims[i]]
        chunk = -(-value.shape[dim] // self.size)
        return value.narrow(dim, min(rank * chunk, value.shape[dim]), length)

    def _entries(self, i: int, rank: int) -> int:
        return torch.Size(self._part_shape(i, rank)).numel()

    def _entries_to_owner(self, counts: Sequence[int]) -> list[int]:
        return [sum(counts[i] * self._entries(i, rank) for i in self.owned) for rank in range(self.size)]

    def _entries_from_owners(self, counts: Sequence[int]) -> list[int]:
        return [sum(counts[i] * self._entries(i, self.rank) for i in self._owned_by(rank)) for rank in range(self.size)]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.empty(0, dtype=self.parameters[0].dtype, device=self.device)
        return torch.cat([t.to(self.device).reshape(-1) for t in tensors])

    def _cut(self, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        parts = flat.split([torch.Size(shape).numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _all_to_all(self, sent: Sequence[Tensor], entries: Sequence[int]) -> Sequence[Tensor]:
        data, sizes = torch.cat(list(sent)), [len(t) for t in sent]
        received = data.new_empty(sum(entries))
        if data.is_complex():  # collectives take pairs of real numbers
            real = torch.view_as_real(received)
            torch.distributed.all_to_all_single(real, torch.view_as_real(data), list(entries), sizes, self.group)
        else:
            torch.distributed.all_to_all_single(received, data, list(entries), sizes, self.group)
        return received.split(list(entries))


class Replicas(NamedTuple):
    """Processes with equal models.

    Args:
        group: of the processes.
        parameters: those that are alike everywhere, as their gradients are, by identity.
    """

    group: Any
    parameters: Mapping[int, Tensor]


class ReplicaExchange(OwnerExchange):
    """One process steps a weight of which all have the whole, and sends it: received are (R−1)/R · N entries.

    Args:
        parameters: of one precision and device, alike on every process, as their gradients are.
        group: of the processes.
    """

    def __init__(self, parameters: Sequence[Tensor], group: Any) -> None:
        Exchange.__init__(self, parameters)
        self.device, self.dims = parameters[0].device, [0] * len(parameters)
        self._divide(group, torch.distributed.get_rank(group))

    def gradient(self, i: int) -> Tensor:
        """The gradient."""
        return dense(self.parameters[i].grad)

    def joined(self, i: int, part: Tensor) -> Tensor:
        """The value itself."""
        return laid_out_as(part, self.parameters[i].grad)

    def agree_on_least(self, values: Tensor) -> Tensor:
        """The least of each of ``values`` over all processes."""
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self.group)
        return values

    def gather(self, parts: Sequence[Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        """Nothing is sent."""
        return {i: list(parts[i]) for i in self.owned}

    def _part_shape(self, i: int, rank: int) -> tuple[int, ...]:
        return tuple(self.parameters[i].shape)

    def _part(self, i: int, rank: int, value: Tensor) -> Tensor:
        return value
