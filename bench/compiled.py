"""Compiles every Triton kernel of the rows for one GPU architecture, which need not be there.

python -m bench.compiled ARCHITECTURE FOLDER      80, 90 or 100: a .cubin and a .ptx a variant into FOLDER

A variant is named kernel-dlogits-switches, such as `_kl_grad_kernel-bf16-T4-REVERSE-HAS_CAP`: the logits are fp32 and
the sizes those that `rows/triton.py` launches it with.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IDS = {"token_ptr": "*i64", "top_ptr": "*i64", "room_ptr": "*i64", "t_room_ptr": "*i64", "common_ptr": "*i32"}
STRIDES = ("stride", "out_stride", "stride_head", "bias_stride")
VARY = ("R", "S", "student", "count", "rest", "first", "place", "weight_stride", "value_stride", "cap_step")
NUMBERS = dict.fromkeys(("V", "stride", "out_stride", "bias_stride", *VARY), "i32")
SWITCHES = ("REVERSE", "FORWARD", "ONE_SIDED", "HAS_CAP", "WEIGHTED", "LACKS")
# bias, softcap and temperature
ALL = 7


def compile_all(architecture: int, folder: Path) -> None:
    """In a process of its own: Triton's interpreter, which tests run in, replaces `triton.jit` at import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled", str(architecture), str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def label(constants: dict[str, int]) -> str:
    """Teachers and the switches that are on."""
    teachers = [f"T{constants['T']}"] if "T" in constants else []
    on = (k + str(constants[k]) * (k == "LACKS") for k in SWITCHES if constants.get(k))
    return "-".join([*teachers, *on]) or "only"


def variants(name: str, names: list[str], fp64: bool) -> Iterator[dict[str, Any]]:
    """Every switch of a kernel; the softcap, which takes few registers, only beside one teacher and the most."""
    import torch
    import triton

    from copd_kernels.rows import HEAD_BITS, MAX_TEACHERS
    from copd_kernels.rows import triton as rows
    from copd_kernels.rows.raw import CAP

    like = torch.empty(0, dtype=torch.float64 if fp64 else torch.float32)
    most = MAX_TEACHERS["triton"]
    for T in ((1,) if fp64 and "stats" in name else (1, 4) if fp64 else (1, 2, 4, most)) if "T" in names else (1,):
        sizes = {
            "T": T,
            "TP": triton.next_power_of_2(T),
            "BITS": HEAD_BITS,
            "LANES": rows.LANES,
            "U": rows.spans(like, T),
        }
        sizes["BLOCK"] = rows.sums_block(like, T) if "sums" in name else rows.block(like, T)
        if "finish" in name:
            sizes["BLOCK"] = rows.FINISHED
        if "overlap" in name:
            sizes["BLOCK"] = rows.COUNT_TILE // sizes["TP"]
        used = [k for k in SWITCHES if k in names]
        for chosen in itertools.product((False, True), repeat=len(used)):
            on = dict(zip(used, chosen, strict=True))
            if on.get("ONE_SIDED") and (on.get("REVERSE") or on.get("FORWARD")):
                continue  # of the JSD alone
            alike = on.get("HAS_CAP", False) is (most == T) or "HAS_CAP" not in names
            if "T" in names and (T > 1 or fp64) and not alike:
                continue
            if "T" in names and T > rows.RAW_TEACHERS and on.get("LACKS"):
                continue  # raw logits of so many are read a few at a time
            lacks = {k: ALL * on["LACKS"] for k in ("LACKS", "TEACHERS_LACK") if k in names}
            if name == "_complete_kernel" and not on["LACKS"]:
                # a pass of its own over logits that lack one thing, the softcap
                lacks = {"LACKS": CAP}
            yield {k: v for k, v in sizes.items() if k in names} | on | lacks


def compile_one(
    kernel: Any,
    architecture: int,
    constants: dict[str, Any],
    logits: str = "fp32",
    dlogits: str = "bf16",
    unit: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The code of one variant; `unit` names the sizes that are 1."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from copd_kernels.rows import triton as rows

    def kind(argument: str) -> str:
        if argument == "dlogits_ptr":
            return "*" + dlogits
        other = "*" + logits if argument.endswith("_ptr") else "i64"
        return IDS.get(argument) or NUMBERS.get(argument) or other

    constants = constants | dict.fromkeys(unit, 1)
    signature = {a: kind(a) for a in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    # as schedule.py aligns rows, whatever V is: what makes the loads 16 bytes wide
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if (a.endswith("_ptr") and a not in anywhere) or (a in STRIDES and a not in unit)
    }
    options = {"num_warps": 1 if "finish" in kernel.__name__ else rows.NUM_WARPS}
    raw = kernel.__name__ == "_kl_stats_kernel" and constants["LACKS"]
    if raw or kernel.__name__ in ("_kl_grad_kernel", "_jsd_sums_kernel", "_logprob_stats_kernel"):
        like = torch.empty(0, dtype=torch.float64 if logits == "fp64" else torch.float32)
        options["maxnreg"] = rows.registers(like, constants.get("T", 1), constants.get("ONE_SIDED", False))
    source = ASTSource(kernel, signature, constants, aligned)
    code: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    return code


def main(architecture: int, folder: Path) -> None:
    from copd_kernels.rows import triton as rows

    for name, kernel in vars(rows).items():
        if not name.endswith("_kernel"):
            continue
        names = kernel.arg_names
        every = list(variants(name, names, False))
        # every variant in the dtype of real models; of the others those that hold the most
        jobs = [(f"bf16-{label(constants)}", (constants,)) for constants in every]
        if "dlogits_ptr" in names:
            some = next(constants for constants in every if constants.get("REVERSE", True))
            jobs += [(f"{dlogits}-{label(some)}", (some, "fp32", dlogits)) for dlogits in ("fp32", "fp16")]
        jobs += [(f"fp64-{label(c)}", (c, "fp64", "fp64")) for c in variants(name, names, True)]
        # one token of one word: Triton puts sizes that are 1 into the code, as constants without a tensor's methods
        unit = tuple(a for a in ("V", *STRIDES) if a in names)
        jobs.append((f"unit-{label(every[0])}", (every[0], "fp32", "fp32", unit)))
        for its_label, arguments in jobs:
            code = compile_one(kernel, architecture, *arguments)
            (folder / f"{name}-{its_label}.cubin").write_bytes(code["cubin"])
            (folder / f"{name}-{its_label}.ptx").write_text(code["ptx"])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
