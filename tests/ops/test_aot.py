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
import itertools
import sys
from pathlib import Path
import torch
import triton
from copd_kernels.rows import MAX_TEACHERS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from copd_kernels.rows import triton as rows

IDS = {"token_ptr": "*i64", "top_ptr": "*i64", "room_ptr": "*i64", "t_room_ptr": "*i64", "common_ptr": "*i32"}
PIECE_IDS = {"top_ptr": "*i32", "t_top_ptr": "*i32"}
NUMBERS = dict.fromkeys(("R", "V", "student", "count", "rest"), "i32")
arch, folder = int(sys.argv[1]), Path(sys.argv[2])

def variants(name, names, logits):
    '''Every switch of a kernel, at the sizes that rows/triton.py launches it with.'''
    like = torch.empty(0, dtype=torch.float64 if logits == "fp64" else torch.float32)
    choices = {"REVERSE": (False, True), "FORWARD": (False, True), "ONE_SIDED": (False, True), "HAS_CAP": (False, True)}
    choices = {k: v for k, v in choices.items() if k in names}
    for T in (1, 3, 4, MAX_TEACHERS["triton"]) if "T" in names else (1,):
        sizes = {"T": T, "TP": triton.next_power_of_2(T), "BITS": rows.HEAD_BITS, "LANES": rows.LANES}
        sizes |= {"U": rows.spans(like), "BLOCK": rows.block(like, T)}
        if "overlap" in name:
            sizes["BLOCK"] = rows.COUNT_TILE // sizes["TP"]
        if "sums" in name:
            sizes["BLOCK"] = rows.sums_block(like, T)
        for chosen in itertools.product(*choices.values()):
            switches = dict(zip(choices, chosen))
            if switches.get("ONE_SIDED") and (switches.get("REVERSE") or switches.get("FORWARD")):
                continue  # of the JSD alone
            yield {k: v for k, v in sizes.items() if k in names} | switches

def argument_type(kernel, argument, logits, dlogits):
    ids = IDS | PIECE_IDS if "stats" in kernel else IDS
    if argument == "dlogits_ptr":
        return "*" + dlogits
    return ids.get(argument) or NUMBERS.get(argument) or ("*" + logits if argument.endswith("_ptr") else "i64")

def compile(name, kernel, logits, dlogits, constants, label, unit=()):
    names = kernel.arg_names
    constants = constants | dict.fromkeys(unit, 1)
    signature = {a: argument_type(name, a, logits, dlogits) for a in names} | dict.fromkeys(constants, "constexpr")
    # sizes are multiples of 16, as real vocabularies are: what makes the loads 16 bytes wide
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
               if a.endswith("_ptr") or (a in ("V", "stride_head", "size") and a not in unit)}
    options = {"num_warps": rows.NUM_WARPS}
    if name in ("_kl_grad_kernel", "_jsd_sums_kernel"):
        options["maxnreg"] = rows.registers(constants["T"])
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (folder / f"{name}-{label}.cubin").write_bytes(compiled.asm["cubin"])
    (folder / f"{name}-{label}.ptx").write_text(compiled.asm["ptx"])

for name, kernel in vars(rows).items():
    if not name.endswith("_kernel"):
        continue
    names = kernel.arg_names
    # every variant in the dtype of real models; of the others those that hold the most
    every = list(variants(name, names, "fp32"))
    for n, constants in enumerate(every):
        jsd = "" if constants.get("REVERSE", True) or constants.get("FORWARD") else "-jsd"
        # one or two columns a thread: the sums of several teachers leave no registers for four
        narrow = "-narrow" if constants.get("BLOCK", 4 * rows.LANES) < 4 * rows.LANES else ""
        compile(name, kernel, "fp32", "bf16", constants, f"bf16-{n}{narrow}{jsd}")
    for dlogits in ("fp32", "fp16") if "dlogits_ptr" in names else ():
        reverse = next(constants for constants in every if constants.get("REVERSE", True))
        compile(name, kernel, "fp32", dlogits, reverse, dlogits)
    for n, constants in enumerate(variants(name, names, "fp64")):
        if constants.get("T", 1) <= (1 if "kl_stats" in name else 3) and not constants.get("HAS_CAP"):
            compile(name, kernel, "fp64", "fp64", constants, f"fp64-{n}")
    # one token of one word: Triton puts sizes that are 1 into the code, as constants without a tensor's methods
    unit = [a for a in ("V", "stride_head") if a in names]
    compile(name, kernel, "fp32", "fp32", every[0], "unit", unit)
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
            if not any(kind in cubin.name for kind in ("overlap", "unit", "fp64", "narrow")):
                assert re.search(r"ld\.global[.\w:]*\.v4\.b32", cubin.with_suffix(".ptx").read_text()), cubin.stem

        # min and max drop a NaN, and saturation hides an infinity; the JSD clamps a log-ratio that is no NaN any more
        for ptx in Path(folder).glob("*_grad_kernel-*.ptx"):
            if "jsd" not in ptx.stem and "unit" not in ptx.stem and "fp64" not in ptx.stem:
                assert not re.search(r"\b(min|max)\.(?!NaN)f|\.sat", ptx.read_text()), ptx.stem


def cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def test_numbers_that_vary_do_not_compile_again():
    script = """
from copd_kernels.rows import triton as rows
for name, kernel in vars(rows).items():
    if name.endswith("_kernel"):
        vary = {p.name for p in kernel.params if p.do_not_specialize}
        assert vary == {"R", "student", "heads", "count", "rest"} & set(kernel.arg_names), (name, vary)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
