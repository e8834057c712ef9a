"""Who lives where, and what travels: the one file that knows that there may be several processes.

    torchrun --standalone --nproc-per-node=3 -m copd.train --config run.yaml

K branches that learn live on W ranks. W <= K: branch k on rank k mod W. W = K * n: n ranks a branch, which split its
weights and prompts (`copd.sharded`); rank r is the (r mod n)-th of branch r div n, and talks to the (r mod n)-th of the
others. Every rank runs the same loop and asks `Place` at the few points where it matters whose branch it is. In one
process nothing here does anything.

Messages go through host memory, by gloo: tensors raw, and each once however often it occurs.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from copd.config import Config
from copd.peers import Peers
from copd.task import Prompt
from copd.topology import teachers

T = TypeVar("T")
Edge = TypeVar("Edge", bound=tuple[Any, ...])
Sent = list[tuple[Any, Tensor]]
"""what to wait for, each with the memory that must stay until then"""
GONE = re.compile(r"[\w ]*(closed by peer|reset by peer|timed out)[\w ]*", re.IGNORECASE)
"""what gloo says of a rank that is no longer there, or does not answer"""
KEEPERS = ("merged", "consolidated")


def number() -> int:
    """This process's rank, as `torchrun` says; 0 where it started none."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def joined(cfg: Config) -> Iterator[None]:
    """The process group of `torchrun`, where it started this process and nobody has joined yet."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout))
    try:
        yield
    except RuntimeError as error:
        if (gone := GONE.search(str(error))) is None:
            raise
        rule = f"ranks: every process must stay to the end and answer within timeout={cfg.timeout:g} s"
        raise ConnectionError(f"{rule}; got {gone[0].strip()}") from error
    # not where something was raised: others may wait for this rank, and torchrun ends them when it is gone
    dist.destroy_process_group()


def device_of(cfg: Config) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if kind == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


class Place(Peers):
    """The ranks of a run, and the branches that live on them.

    Args:
        names: of the branches that learn, in order, the same on all ranks.
        timeout: seconds that the ranks of a branch wait for each other.

    Raises `ValueError` where there are more ranks than branches, and no multiple of them.
    """

    def __init__(self, names: Sequence[str], timeout: float = 7200.0) -> None:
        super().__init__(*((dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else ()))
        self.limit, self.rows = timedelta(seconds=timeout), min(self.size, len(names))
        if self.size % self.rows:
            rule = f"ranks: processes must be at most {len(names)} or a multiple, one or more for each of"
            raise ValueError(f"{rule} {', '.join(names)}; got {self.size}")
        self.each_has = self.size // self.rows
        self.row, self.column = divmod(self.index, self.each_has)
        self.owner = {name: k % self.rows for k, name in enumerate(names)}
        self.owed: Sent = []

    @cached_property
    def peers(self) -> Peers:
        """The ranks of a branch that this is one of. All ranks ask at the same time, first for their first branch."""
        if self.each_has == 1:
            return Peers()
        group, kind = self._row(), "cuda" if "nccl" in dist.get_backend_config() else "cpu"
        return Peers(self.each_has, self.column, group, DeviceMesh.from_group(group, kind, mesh_dim_names=("dp",)))

    @cached_property
    def aside(self) -> tuple[Peers, Peers]:
        """All ranks, and those of a branch, for what goes on beside the loop and must not get in its words' way."""
        if self.size == 1:
            return Peers(), Peers()
        everyone = Peers(self.size, self.index, dist.new_group(timeout=self.limit, backend="gloo"))
        return everyone, Peers(self.each_has, self.column, self._row(backend="gloo"))

    def _row(self, **options: Any) -> Any:
        rows = [list(range(row * self.each_has, (row + 1) * self.each_has)) for row in range(self.rows)]
        return dist.new_subgroups_by_enumeration(rows, timeout=self.limit, **options)[0]

    @classmethod
    def of(cls, cfg: Config) -> Place:
        names = {"mixed": ["mixed"], "mopd": ["student"]}.get(cfg.method, list(cfg.branches))
        place = cls(names, cfg.timeout)
        if place.size > 1 and cfg.rollout.engine != "transformers":
            rule = "ranks: rollout.engine must be transformers with several processes"
            raise ValueError(f"{rule}; got {cfg.rollout.engine}")
        if (size := place.each_has) > 1:
            where = f"with {size} ranks a branch"
            for name, value in (("offload", cfg.offload), ("model.adapter", cfg.model.adapter)):
                if value:
                    raise ValueError(f"ranks: {name} must be off {where}; got {value}")
            split = cfg.method == "copd" and cfg.opd.batch == "split"
            least = size * max(map(len, teachers(cfg).values())) if split else size
            if cfg.rollout.prompts < least:
                where += " and opd.batch=split" if split else ""
                raise ValueError(f"ranks: rollout.prompts must be at least {least} {where}; got {cfg.rollout.prompts}")
        return place

    def keeper(self, name: str) -> int:
        """The row of a model. What is made of all branches lives with the last one, what is given with the first."""
        return self.owner.get(name, self.rows - 1 if name in KEEPERS else 0)

    def holds(self, name: str) -> bool:
        return self.keeper(name) == self.row

    def partner(self, name: str) -> int:
        """The rank that speaks with this one for a model."""
        return self.keeper(name) * self.each_has + self.column

    def each(self, items: Sequence[Edge], work: Callable[[Edge], T]) -> Iterator[tuple[Edge, T]]:
        """Each item, which begins with a model's name, and what `work` makes of it where that model lives."""
        if self.size == 1:
            yield from ((item, work(item)) for item in items)
            return
        found = self.together(lambda: {item: work(item) for item in items if self.holds(item[0])})
        yield from self.union(found, items).items()

    # what one rank tells another

    def exchange(
        self,
        edges: Sequence[Edge],
        ask: Callable[[Edge], Any],
        answer: Callable[[Edge, Any, torch.device], tuple[Any, Sequence[Any]]],
        device: torch.device,
        times: int = 1,
    ) -> Iterator[tuple[Edge, tuple[Any, Sequence[Any]]]]:
        """Each edge (student, teacher, ...) whose student lives here, with what the teacher answers.

        An answer is what is told at once, and a sequence of what is told item by item; its tensors are on the device it
        was asked for. The items of another rank wait there, in host memory, until the student reads them: in order,
        `times` times over, every one, before all ranks `settle`.

        All ranks give the same edges in the same order. They ask, then answer side by side, then listen. Messages of a
        pair of ranks arrive as they were sent, and no rank waits before it has said what others wait for.
        """
        if self.size == 1:
            yield from ((edge, answer(edge, ask(edge), device)) for edge in edges)
            return
        sent: Sent = []
        kept: dict[Edge, Any] = {}
        host = torch.device("cpu")

        def say(edge: Edge, what: Any, rank: int) -> None:
            if rank == self.index:
                kept[edge] = what
            else:
                sent.extend(send(what, rank))

        def hear(edge: Edge, rank: int) -> Any:
            return kept.pop(edge) if rank == self.index else receive(rank, device)

        ends = [(edge, self.partner(edge[0]), self.partner(edge[1])) for edge in edges]
        for edge, student, teacher in ends:
            if student == self.index:
                say(edge, ask(edge), teacher)
        for tag, (edge, student, teacher) in enumerate(ends, start=1):
            if teacher != self.index:
                continue
            if student == self.index:
                say(edge, answer(edge, hear(edge, student), device), student)
                continue
            told, items = answer(edge, hear(edge, student), host)
            say(edge, (told, len(items)), student)
            # one that stays the last one read is not read anew
            for item in [*items] * (times if len(items) > 1 else 1):
                self.owed += send(item, student, tag)
        for tag, (edge, student, teacher) in enumerate(ends, start=1):
            if student == self.index:
                told, items = hear(edge, teacher)
                yield edge, (told, items if teacher == self.index else Arriving(teacher, tag, device, items))
        for work, _ in sent:
            work.wait()

    def settle(self) -> None:
        """Waits until the others have read what waits for them here."""
        for work, _ in self.owed:
            work.wait()
        self.owed = []

    def bring(self, found: dict[str, T], names: Sequence[str], to: str) -> dict[str, T] | None:
        """What each named branch has here or elsewhere, in host memory where `to` lives; None on the other ranks."""
        target, brought = self.partner(to), dict(found)
        for name in names:
            source = self.partner(name)
            if self.index == source != target:
                for work, _ in send(found[name], target):
                    work.wait()
            elif self.index == target != source:
                brought[name] = receive(source, torch.device("cpu"))
        return {name: brought[name] for name in names} if self.index == target else None


@dataclass
class Arriving(Sequence[Any]):
    """What another rank tells item by item, each when it is read: in order, from the first again after the last.

    The one read last is the only one here, and may be read again.
    """

    rank: int
    tag: int
    device: torch.device
    size: int
    at: int = -1
    item: Any = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if index not in range(self.size):
            raise IndexError(index)
        if index != self.at:
            following = (self.at + 1) % self.size
            if index != following:
                raise RuntimeError(f"exchange: item {following} of rank {self.rank} must be read next; got {index}")
            self.item = None  # before the next one is here
            self.item, self.at = receive(self.rank, self.device, self.tag), index
        return self.item


class _Pickler(pickle.Pickler):
    """Sets tensors aside, and leaves of a prompt what scoring reads."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.seen: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.seen:
            self.seen[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.seen[id(value)]

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Prompt):
            return Prompt, (value.task, value.index, "", value.input_ids, value.mm_token_type_ids, value.media)
        return NotImplemented


def send(what: Any, rank: int, tag: int = 0) -> Sent:
    """Begins to send anything that pickles."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(what)
    tensors = [tensor.detach().contiguous().cpu() for tensor in pickler.tensors]
    header = pickle.dumps((file.getvalue(), [(tensor.dtype, tensor.shape) for tensor in tensors]))
    parts = [torch.tensor([len(header)]), torch.frombuffer(bytearray(header), dtype=torch.uint8)]
    parts += [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
    return [(dist.isend(part, rank, tag=tag), part) for part in parts]


def receive(rank: int, device: torch.device, tag: int = 0) -> Any:
    """What `rank` sends next under this tag, its tensors on `device`."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, rank, tag=tag)
    header = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(header, rank, tag=tag)
    text, shapes = pickle.loads(header.numpy().tobytes())
    tensors = []
    for dtype, shape in shapes:
        part = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        if len(part):
            dist.recv(part, rank, tag=tag)
        tensors.append(part.view(dtype).reshape(shape).to(device))
    unpickler = pickle.Unpickler(io.BytesIO(text))
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]  # as pickle documents it
    return unpickler.load()
