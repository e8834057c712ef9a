"""Time and peak memory of kl and logprob beside eager PyTorch and TRL, one process an entry, in one run.

    python -m bench.compare --N 2048 --V 65536 --D 512 --dtype float32
    python -m bench.compare --rounds 1 --N 512 --V 8192 --D 128

Every entry does forward and backward on the same inputs. `gemm` is the bare GEMM passes the op needs, at the chunk
height it uses: the roof. Rounds are interleaved, the median is reported with the fastest and slowest beside it. Peak
memory is what the process grew by, inputs left out. Each entry's loss is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from copd_kernels import Head, kl, logprob, reference
from copd_kernels.schedule import Workspace


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden, lm_head = torch.randn(args.N, args.D), torch.randn(args.V, args.D) / args.D**0.5
    teacher_hidden = hidden + 0.1 * torch.randn(args.N, args.D)
    tensors = [x.to(dtype) for x in (hidden, lm_head, teacher_hidden, lm_head.clone())]
    for x in tensors[:2]:
        x.requires_grad_()
    return *tensors, torch.randint(0, args.V, (args.N,))


def eager_kl(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    log_p = F.linear(hidden, lm_head).float().log_softmax(-1)
    log_q = F.linear(teacher_hidden, teacher_lm_head).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(tokens)


def eager_logprob(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    log_p = F.linear(hidden, lm_head).float().log_softmax(-1)
    return log_p.gather(1, tokens[:, None]).mean()


def ours_kl(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    return kl(Head(hidden, lm_head), Head(teacher_hidden, teacher_lm_head), divergence="reverse")


def ours_logprob(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    return logprob(Head(hidden, lm_head), tokens).logp.mean()


def trl_kl(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    # beta = 1 is TRL's reverse KL; its second output is a diagnostic
    outputs = ChunkedDivergenceFunction.apply(hidden, lm_head, None, teacher_hidden, teacher_lm_head, None, 1.0)
    return outputs[0].mean()


def trl_logprob(hidden, lm_head, teacher_hidden, teacher_lm_head, tokens):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # logp, and the entropy that `logprob` also makes; vocabulary tiles as wide as the divergence's
    outputs = ChunkedLogProbFunction.apply(hidden, lm_head, None, tokens, 1.0, 32768, None, 1.0, ("entropy",))
    return outputs[0].mean()


def gemm_roof(hidden, lm_head, heads: int) -> None:
    """The GEMMs of `heads` projections and two projections back, in fp32, at the chunk height the op would use."""
    hidden, lm_head = hidden.detach().float(), lm_head.detach().float()
    space = Workspace(hidden.shape[0], heads, lm_head.shape[0], hidden, 0)
    dlm_head = torch.zeros_like(lm_head)
    for chunk in space.chunks:
        z = space.logits(chunk.stop - chunk.start)
        for out in z:
            torch.mm(hidden[chunk], lm_head.T, out=out)
        torch.mm(z[0], lm_head)
        torch.addmm(dlm_head, z[0].T, hidden[chunk], out=dlm_head)


ENTRIES = {
    "kl gemm": None,
    "kl ours": ours_kl,
    "kl eager": eager_kl,
    "kl trl": trl_kl,
    "logprob gemm": None,
    "logprob ours": ours_logprob,
    "logprob eager": eager_logprob,
    "logprob trl": trl_logprob,
}


def measure(entry: str, args: argparse.Namespace) -> dict[str, float]:
    """One timed call in this process: seconds, MiB the process grew by, and the loss."""
    tensors = inputs(args)
    run = ENTRIES[entry]
    small = argparse.Namespace(**vars(args) | {"N": 8, "V": 512})
    warm = inputs(small)
    if run:
        run(*warm).backward()
    else:
        gemm_roof(*warm[:2], 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = None
    if run:
        loss = run(*tensors)
        loss.backward()
    else:
        # kl with one teacher and logprob both spend four passes: two projections, two back
        gemm_roof(*tensors[:2], 2)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "mib": grown, "loss": float("nan") if loss is None else loss.item()}


def exact(op: str, args: argparse.Namespace) -> float:
    hidden, lm_head, teacher_hidden, teacher_lm_head, tokens = inputs(args)
    total = 0.0
    with torch.no_grad():
        for part in range(0, args.N, 128):
            rows = slice(part, part + 128)
            student = Head(hidden[rows].double(), lm_head.double())
            teacher = Head(teacher_hidden[rows].double(), teacher_lm_head.double())
            log_p = reference.log_softmax(student)
            if op == "kl":
                total += reference.diverge(log_p, reference.log_softmax(teacher), "reverse", 0.5).sum().item()
            else:
                total += log_p.gather(1, tokens[rows, None]).sum().item()
    return total / args.N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--N", type=int, default=2048)
    parser.add_argument("--V", type=int, default=65536)
    parser.add_argument("--D", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=ENTRIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return

    results: dict[str, list[dict[str, float]]] = {entry: [] for entry in ENTRIES}
    for _ in range(args.rounds):
        for entry in ENTRIES:
            sizes = [f"--{name}={getattr(args, name)}" for name in ("N", "V", "D", "dtype")]
            command = [sys.executable, "-m", "bench.compare", *sizes, f"--only={entry}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{entry}: did not run: {done.stderr.strip().splitlines()[-1]}")
                continue
            results[entry].append(json.loads(done.stdout))

    print(
        f"N={args.N} V={args.V} D={args.D} {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'entry':15}{'s':>8}{'min':>8}{'max':>8}{'of roof':>9}{'ours is':>9}{'MiB':>8}{'loss error':>12}")
    for op in ("kl", "logprob"):
        truth = exact(op, args)
        median = {
            e: statistics.median(r["seconds"] for r in rs) for e, rs in results.items() if rs and e.startswith(op)
        }
        for entry, seconds in median.items():
            rounds = results[entry]
            times = [r["seconds"] for r in rounds]
            error = abs(rounds[0]["loss"] - truth) / abs(truth)
            share, ratio = median[f"{op} gemm"] / seconds, seconds / median[f"{op} ours"]
            print(
                f"{entry:15}{seconds:8.2f}{min(times):8.2f}{max(times):8.2f}{share:9.0%}{ratio:8.2f}x"
                f"{max(r['mib'] for r in rounds):8.0f}{error:12.1e}"
            )


if __name__ == "__main__":
    main()
