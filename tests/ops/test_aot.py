"""Every Triton kernel compiled for its GPUs at its real tile sizes, without a GPU and without a spilled byte."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

# compiling needs the real `triton.jit`, which the interpreter replaces at import
SCRIPT = """
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from copd_kernels.rows import triton as rows

IDS = {"token_ptr": "*i64", "top_ptr": "*i64", "room_ptr": "*i64", "t_room_ptr": "*i64", "common_ptr": "*i32"}
PIECE_IDS = {"top_ptr": "*i32", "t_top_ptr": "*i32"}
NUMBERS = dict.fromkeys(("R", "V", "student", "tiles_per_split"), "i32")
arch, folder = int(sys.argv[1]), Path(sys.argv[2])
teachers = [{"T": T, "TP": triton.next_power_of_2(T)} for T in (1, 3)]
directions = [(r, f) for r in (False, True) for f in (False, True)]

def variants(name, names):
    for tile in teachers if "T" in names else [{}]:
        whole = rows.COUNT_TILE if "overlap" in name else rows.TILE
        block = {"BLOCK": whole // tile.get("TP", 1)}
        shape = {k: v for k, v in (tile | block | {"BITS": rows.HEAD_BITS}).items() if k in names}
        for cap in (False, True) if "HAS_CAP" in names else (None,):
            for r, f in directions if "REVERSE" in names else [(None, None)]:
                yield shape | {k: v for k, v in (("HAS_CAP", cap), ("REVERSE", r), ("FORWARD", f)) if v is not None}

def argument_type(kernel, argument, logits, dlogits):
    ids = IDS | PIECE_IDS if "stats" in kernel else IDS
    if argument == "dlogits_ptr":
        return "*" + dlogits
    return ids.get(argument) or NUMBERS.get(argument) or ("*" + logits if argument.endswith("_ptr") else "i64")

for name, kernel in vars(rows).items():
    if not name.endswith("_kernel"):
        continue
    names = kernel.arg_names
    for logits, dlogits in (("fp32", "bf16"), ("fp32", "fp32"), ("fp32", "fp16")):
        # every variant in the dtype of real models; what the stores of the others do is in any one variant
        some = 1 if dlogits != "bf16" else None
        if some and "dlogits_ptr" not in names:
            continue
        for n, constants in enumerate(list(variants(name, names))[:some]):
            signature = {a: argument_type(name, a, logits, dlogits) for a in names}
            signature |= dict.fromkeys(constants, "constexpr")
            # sizes are multiples of 16, as real vocabularies are: what makes the loads 16 bytes wide
            aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
                       if a.endswith("_ptr") or a in ("V", "stride_head", "count")}
            source = ASTSource(kernel, signature, constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": rows.NUM_WARPS})
            (folder / f"{name}-{dlogits}-{n}.cubin").write_bytes(compiled.asm["cubin"])
            (folder / f"{name}-{dlogits}-{n}.ptx").write_text(compiled.asm["ptx"])
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_triton_kernel_compiles_without_spills(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SCRIPT, str(arch), folder], check=True, env=environment)
        cubins = sorted(Path(folder).glob("*.cubin"))
        assert len({c.name.split("-")[0] for c in cubins}) == 7
        for cubin in cubins:
            report = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], check=True, capture_output=True)
            usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout.decode())
            registers, stack, local = map(int, usage.groups())
            assert (stack, local) == (0, 0), f"{cubin.stem}: {registers} registers, {stack + local} bytes spilled"
            if "overlap" not in cubin.name:
                assert re.search(r"ld\.global[.\w:]*\.v4\.b32", cubin.with_suffix(".ptx").read_text()), cubin.stem


def cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def test_one_token_of_one_word_compiles():
    """Triton puts sizes that are 1 into the code, as constants without the methods of a tensor."""
    script = SCRIPT.split("for name, kernel in vars(rows)")[0] + ONE_WORD
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script, "90", "."], check=True, env=environment)


ONE_WORD = """
for name in ("_kl_stats_kernel", "_kl_grad_kernel", "_overlap_kernel"):
    kernel = getattr(rows, name)
    constants = next(iter(variants(name, kernel.arg_names))) | {"V": 1, "stride_head": 1}
    signature = {a: argument_type(name, a, "fp32", "fp32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": rows.NUM_WARPS})
"""


def test_numbers_that_vary_do_not_compile_again():
    script = """
from copd_kernels.rows import triton as rows
for name, kernel in vars(rows).items():
    if name.endswith("_kernel"):
        vary = {p.name for p in kernel.params if p.do_not_specialize}
        assert vary == {"R", "student", "heads", "tiles_per_split"} & set(kernel.arg_names), (name, vary)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
