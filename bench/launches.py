"""How many kernels a chunk of an op launches beside its GEMMs, counted without a GPU.

python -m bench.launches          a table: ops, teachers and divergences, on Triton's and native rows

A chunk's launches are what an op of three chunks launches more than one of two: operators of torch that write memory,
kernels of Triton and calls into csrc/. What a device would not run is left out: views, empty memory, numbers that the
host reads. The same Python runs on CPU tensors in fp32 as on CUDA ones, so the count is that of a GPU. Triton's kernels
are counted, and not run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from copd_kernels import Head, kl, logprob, mutual_kl
from copd_kernels._ops import NAMESPACE

GEMMS = ("mm", "addmm", "bmm", "baddbmm")
# a chunk's rows, and columns enough for tokens of a small vocabulary
ROWS, V, D = 4, 64, 8
BACKENDS = ("triton", "native")
DIVERGENCES = ("reverse", "forward", "symmetric", "jsd")


class Launches(NamedTuple):
    kernels: Counter[str]
    """beside the GEMMs, by name"""
    gemms: int
    allocations: int
    """tensors that own memory, whether an operator fills them or not"""

    def less(self, other: Launches) -> Launches:
        kernels = self.kernels.copy()
        kernels.subtract(other.kernels)
        return Launches(+kernels, self.gemms - other.gemms, self.allocations - other.allocations)


class Recorder(TorchDispatchMode):
    """Sees every operator, inside this package's own too."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.gemms = self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
        fresh = [r for r in returns if r.alias_info is None and "Tensor" in str(r.type)]
        written = any(r.alias_info is not None and r.alias_info.is_write for r in returns)
        self.allocations += len(fresh)
        if name in GEMMS:
            self.gemms += 1
        elif (fresh or written) and not name.startswith(("empty", "new_empty")):
            self.kernels[name] += 1
        return result


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Counts everything that the body launches: kernels of Triton's interpreter and calls into csrc/ among it."""
    from triton.runtime.interpreter import GridExecutor

    from copd_kernels.rows import native

    recorder, compiled = Recorder(), native._C

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        recorder.kernels[kernel.fn.__name__] += 1

    class Compiled:
        def __getattr__(self, name: str) -> Any:
            recorder.kernels[f"_C.{name}"] += 1
            return getattr(compiled, name)

    with mock.patch.object(GridExecutor, "__call__", launch), mock.patch.object(native, "_C", Compiled()), recorder:
        yield recorder


def of_a_chunk(run: Callable[[int, int], object], row_bytes: int) -> Launches:
    """`run(N, workspace_bytes)` does an op on N tokens: what its third chunk of ROWS launches."""
    counts = []
    for chunks in (2, 3):
        with recorded() as recorder:
            run(chunks * ROWS, ROWS * row_bytes)
        counts.append(Launches(recorder.kernels, recorder.gemms, recorder.allocations))
    return counts[1].less(counts[0])


def heads(count: int, N: int, bias: bool = False, softcap: float | None = None) -> list[Head]:
    made = []
    for _ in range(count):
        hidden, lm_head = torch.randn(N, D), torch.randn(V, D)
        offsets = torch.randn(V, requires_grad=True) if bias else None
        made.append(Head(hidden.requires_grad_(), lm_head.requires_grad_(), offsets, softcap=softcap))
    return made


def of_kl(backend: str, T: int, divergence: str, routed: bool = False, warm: bool = False, **fields: Any) -> Launches:
    """With gradients of a student's hidden states and lm_head, and of its bias if it has one.

    `warm`: with a temperature a token.
    """

    def run(N: int, workspace_bytes: int) -> None:
        student, *teachers = heads(1 + T, N, **fields)
        options: dict[str, Any] = {"temperature": torch.full((N,), 2.0)} if warm else {}
        if routed:
            # all of them to the first
            empty = [Head(t.hidden[:0], t.lm_head, t.bias, softcap=t.softcap) for t in teachers[1:]]
            teachers, options["teacher_index"] = [teachers[0], *empty], torch.zeros(N, dtype=torch.int64)
        kl(student, teachers, divergence=divergence, backend=backend, workspace_bytes=workspace_bytes, **options)

    return of_a_chunk(run, (2 if routed else 1 + T) * V * 4)


def of_logprob(backend: str, **fields: Any) -> Launches:
    """Forward and backward together, which makes its logits again."""

    def run(N: int, workspace_bytes: int) -> None:
        (head,) = heads(1, N, **fields)
        options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes, "recompute": True}
        sum(x.sum() for x in logprob(head, torch.zeros(N, dtype=torch.int64), **options)).backward()

    return of_a_chunk(run, V * 4)


def of_mutual_kl(backend: str, K: int, divergence: str, **fields: Any) -> Launches:
    """Every head learns from every other."""

    def run(N: int, workspace_bytes: int) -> None:
        mutual_kl(heads(K, N, **fields), divergence=divergence, backend=backend, workspace_bytes=workspace_bytes)

    return of_a_chunk(run, (K + 1) * V * 4)


HEADS: dict[str, dict[str, Any]] = {
    "": {},
    ", softcap": {"softcap": 3.0},
    ", bias, softcap": {"bias": True, "softcap": 3.0},
}


def cases(backend: str) -> dict[str, Callable[[], Launches]]:
    """Every op whose chunks are counted."""
    made: dict[str, Callable[[], Launches]] = {}
    for end, fields in HEADS.items():
        for divergence in DIVERGENCES:
            last = divergence + end
            for T in (1, 4):
                made[f"kl, T = {T}, {last}"] = partial(of_kl, backend, T, divergence, **fields)
            made[f"kl, routed, {last}"] = partial(of_kl, backend, 2, divergence, routed=True, **fields)
            made[f"kl, a temperature a token, {last}"] = partial(of_kl, backend, 1, divergence, warm=True, **fields)
            made[f"mutual_kl, K = 3, {last}"] = partial(of_mutual_kl, backend, 3, divergence, **fields)
        made[f"logprob{end}"] = partial(of_logprob, backend, **fields)
    return made


def main() -> None:
    print("| op | " + " | ".join(BACKENDS) + " | allocations, " + " | ".join(BACKENDS) + " |")
    print("|---|" + "---|" * 2 * len(BACKENDS))
    every = [cases(backend) for backend in BACKENDS]
    for name in every[0]:
        counts = [its[name]() for its in every]
        cells = [str(x.kernels.total()) for x in counts] + [str(x.allocations) for x in counts]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
