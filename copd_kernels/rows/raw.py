"""What logits still lack when a GEMM has made them. Whoever reads a row first completes it.

    z = cap tanh((x + bias) / cap) / temperature

A pass of its own over a chunk of them costs about as much as a sweep: it is taken where logits are read piecemeal, and
by the torch rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

BIAS, CAP, TEMPERATURE = 1, 2, 4


@dataclass(frozen=True)
class Raw:
    """Of the heads whose logits are z[0], z[1], ..."""

    V: int
    """tokens; the columns from there on are none, and lack nothing"""
    bias: Tensor | None
    """(H, V) in the logits' dtype, 0 of a head without one"""
    caps: list[float]
    """of each head, 0 for none"""
    temperature: Tensor | None = None
    """(R,), where a token has its own"""
    left: set[int] = field(default_factory=set)
    """the heads that are raw yet"""

    @property
    def kind(self) -> int:
        parts = (self.bias is not None, BIAS), (any(self.caps), CAP), (self.temperature is not None, TEMPERATURE)
        return sum(bit for there, bit in parts if there)

    @property
    def stride(self) -> int:
        """From one head's bias to the next."""
        return 0 if self.bias is None else self.bias.stride(0)

    def of_chunk(self, temperature: Tensor | None = None) -> Raw:
        """Of logits that were just made."""
        raw = replace(self, temperature=temperature)
        return replace(raw, left={*range(len(self.caps))} if raw.kind else set())

    def take(self, heads: Iterable[int]) -> list[int]:
        """Those of them that are raw, which whoever asks completes."""
        taken = [head for head in dict.fromkeys(heads) if head in self.left]
        self.left.difference_update(taken)
        return taken

    def complete(self, z: Tensor, how: Callable[..., None], heads: Iterable[int] | None = None) -> None:
        """At once, by the backend's `complete`: what is raw of all heads of z, or of some."""
        for head in self.take(range(len(z)) if heads is None else heads):
            bias = None if self.bias is None else self.bias[head]
            how(z[head, :, : self.V], bias, self.caps[head], self.temperature)

    def take_sides(self, z: Tensor, student: int, teachers: list[int], how: Callable[..., None]) -> tuple[bool, bool]:
        """Whether one sweep completes the student, and every teacher; what it could not is completed here."""
        heads = [student, *teachers]
        alike = len({j in self.left for j in teachers}) == 1 and len({*heads}) == len(heads)
        if not alike or z.shape[2] > self.V:
            self.complete(z, how, heads)
        taken = self.take(heads)
        return student in taken, teachers[0] in taken


# of logits that lack nothing
COMPLETE = Raw(0, None, [0.0])
