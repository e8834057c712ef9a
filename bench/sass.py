"""What the loops of a GPU kernel issue, read from its machine code as `nvdisasm` prints it.

A loop is a natural one of the flow graph: a branch back to a block that dominates it, and all between. Of the ways
through its body the one that ordinary rows take is counted: it reads whole tiles (as many wide loads as asked for, the
fewest narrow accesses), works on every number it reads (the most exponentials), and is the shortest of those. So what
hangs on a tile's end, a top token, a row without weight or an absent softcap is passed over. A predicated instruction
counts, for it takes its slot.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.compiled import cuobjdump

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;")
LABEL = re.compile(r"\.L_x_\d+")
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# with half the lanes of fused multiply-adds: integers, comparisons, choices, moves of bits
ALU = {"F2FP", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "I2FP", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3"}
ALU |= {"MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3"}
# with an eighth of them: exponentials, logarithms, reciprocals, and conversions to and from integers
SPECIAL = {"F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC"}
SHARED, GLOBAL = {"ATOMS", "LDS", "LDSM", "STS", "STSM"}, {"ATOMG", "LD", "LDG", "RED", "ST", "STG"}
KINDS = {
    "alu": ALU,
    "special": SPECIAL,
    "shared": SHARED,
    "global": GLOBAL,
    "barriers": {"BAR"},
    "shuffles": {"MATCH", "REDUX", "SHFL", "VOTE"},
}
# what is counted of a way through a loop
FIGURES = ("instructions", *KINDS, "shared_bytes", "global_bytes")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str
    target: int | None = None
    """of a branch"""

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes a thread reads or writes."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.operands or ".DIV" in self.opcode


def functions(cubin: Path, wanted: str = "") -> dict[str, list[Instruction]]:
    """Mangled name -> instructions, of the functions whose name has the pattern `wanted` in it."""
    command = [cuobjdump().with_name("nvdisasm"), "-ndf", "-c", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^\.text\.(\S+):\n", text, flags=re.MULTILINE)
    codes = zip(sections[1::2], sections[2::2], strict=True)
    return {name: read(code) for name, code in codes if re.search(wanted, name)}


def read(code: str) -> list[Instruction]:
    """A function's lines; what follows its section has neither addresses nor instructions."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in code.splitlines():
        if match := LINE.match(line):
            found.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
            labels |= dict.fromkeys(waiting, found[-1].address)
            waiting = []
        elif line.startswith("."):
            waiting += LABEL.findall(line.split(":")[0])
    return [
        replace(i, target=labels[to[0]]) if i.base == "BRA" and (to := LABEL.findall(i.operands)) else i for i in found
    ]


@dataclass(eq=False)
class Loop:
    """Blocks by number; `own` are those in no loop within that reads what this package calls logits."""

    head: int
    body: set[int]
    children: list[Loop] = field(default_factory=list)
    parent: Loop | None = None

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


@dataclass(frozen=True)
class Cost:
    """Of a way through a loop. The least `order` is the ordinary one."""

    order: tuple[int, ...]
    counts: tuple[int, ...]

    def __add__(self, other: Cost) -> Cost:
        order, counts = zip(self.order, other.order, strict=True), zip(self.counts, other.counts, strict=True)
        return Cost(tuple(map(sum, order)), tuple(map(sum, counts)))


class Flow:
    """The flow graph of a function. Its logits come by `memory`, LDG or, out of a cluster's ring, LDS; `width` bytes or
    more at once, and without a predicate unless `masked`."""

    def __init__(self, code: Sequence[Instruction], memory: str = "LDG", width: int = 8, masked: bool = False) -> None:
        self.memory, self.width, self.masked = memory, width, masked
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        self.blocks: list[list[Instruction]] = []
        for before, i in zip([None, *code], code, strict=False):
            if before is None or i.address in starts or before.base in ENDS:
                self.blocks.append([])
            self.blocks[-1].append(i)
        at = {block[0].address: n for n, block in enumerate(self.blocks)}
        self.next = [self.leave(n, at) for n in range(len(self.blocks))]
        self.back: list[tuple[int, int]] = []
        self.loops = self.find()

    def leave(self, n: int, at: dict[int, int]) -> list[int]:
        last = self.blocks[n][-1]
        on = [n + 1] if (last.base not in ENDS or last.conditional) and n + 1 < len(self.blocks) else []
        return on + ([at[last.target]] if last.target is not None else [])

    def find(self) -> list[Loop]:
        order, seen, stack = [], {0}, [(0, iter(self.next[0]))]
        while stack:
            n, rest = stack[-1]
            new = next((m for m in rest if m not in seen), None)
            if new is None:
                order.append(stack.pop()[0])
            else:
                seen.add(new)
                stack.append((new, iter(self.next[new])))
        order.reverse()
        before: list[list[int]] = [[] for _ in self.blocks]
        for n in order:
            for m in self.next[n]:
                before[m].append(n)
        above = {0: {0}}  # the blocks that every way to a block passes
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                new = set.intersection(*(above[m] for m in before[n] if m in above)) | {n}
                changed |= above.get(n) != new
                above[n] = new
        bodies: dict[int, set[int]] = {}
        for n in order:
            for head in set(self.next[n]) & above[n]:
                self.back.append((n, head))
                body, front = bodies.setdefault(head, {head}), [n]
                while front:
                    m = front.pop()
                    if m not in body:
                        body.add(m)
                        front += before[m]
        loops = [Loop(head, body) for head, body in sorted(bodies.items(), key=lambda item: -len(item[1]))]
        for i, loop in enumerate(loops):
            loop.parent = next((outer for outer in reversed(loops[:i]) if loop.head in outer.body), None)
            if loop.parent:
                loop.parent.children.append(loop)
        return loops

    def reads(self, i: Instruction) -> bool:
        return i.base == self.memory and i.width >= self.width and (self.masked or not i.predicate)

    def read(self, blocks: Iterable[int]) -> int:
        """Bytes of logits."""
        return sum(i.width for n in blocks for i in self.blocks[n] if self.reads(i))

    def own(self, loop: Loop) -> set[int]:
        return loop.body.difference(*(child.body for child in loop.children))

    def stores(self, loop: Loop) -> bool:
        return any(i.base == "STG" for n in self.own(loop) for i in self.blocks[n])

    def written(self, loop: Loop) -> int:
        """Bytes, by 16-byte stores to device memory."""
        return sum(i.width for n in self.own(loop) for i in self.blocks[n] if i.base == "STG" and i.width == 16)

    def sweeps(self) -> list[Loop]:
        """Loops that read logits, in the order of the code; the whole function if there is none.

        A loop over teachers belongs to the sweep around it if that one stores. Of loops in one place that do not store,
        a later one that reads no more sweeps again after a number that is none, which no ordinary row does.
        """
        innermost = [x for x in self.loops if self.read(x.body) and not any(self.read(c.body) for c in x.children)]
        found: list[Loop] = []
        for loop in sorted(innermost, key=lambda x: x.head):
            if loop.parent and loop.parent.depth and self.stores(loop.parent):
                loop = loop.parent
            here = [x for x in found if x.parent is loop.parent and not self.stores(x) and not self.stores(loop)]
            again = [x for x in here if self.read(x.body) >= self.read(loop.body)]
            if not again and loop not in found:
                found.append(loop)
        return found or [Loop(0, {*range(len(self.blocks))})]

    def cost(self, n: int) -> Cost:
        block = self.blocks[n]
        narrow = sum(i.width < 8 for i in block if i.base in SHARED | GLOBAL)
        order = (narrow, -sum(i.opcode == "MUFU.EX2" for i in block), len(block))
        kinds = [sum(i.base in opcodes for i in block) for opcodes in KINDS.values()]
        moved = [sum(i.width for i in block if i.base in opcodes) for opcodes in (SHARED, GLOBAL)]
        return Cost(order, (len(block), *kinds, *moved))

    def ways(self, loop: Loop, most: int) -> dict[int, Cost]:
        """Bytes of logits that a trip reads, at most so many -> the ordinary way that reads them."""
        within = {child.head: child for child in loop.children}
        reading = {head for head, child in within.items() if self.read(child.body)}
        costs, reads = {n: self.cost(n) for n in loop.body}, {n: self.read([n]) for n in loop.body}
        # a block, what was read so far, and until a loop within began its turn: one that read nothing takes no other
        start = (loop.head, reads[loop.head], 0)
        best, front, ends = {start: costs[loop.head]}, [start], dict[int, Cost]()
        while front:
            place = front.pop()
            n, so_far, begun = place
            for m in self.next[n] or [loop.head]:
                if m == loop.head:
                    if so_far not in ends or best[place].order < ends[so_far].order:
                        ends[so_far] = best[place]
                    continue
                if m not in loop.body or ((n, m) in self.back and (m not in reading or so_far == begun)):
                    continue
                onward = (m, so_far + reads[m], so_far if m in within else begun)
                cost = best[place] + costs[m]
                if onward[1] <= most and (onward not in best or cost.order < best[onward].order):
                    best[onward] = cost
                    front.append(onward)
        return ends
