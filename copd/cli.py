"""The `copd` command: train | study | eval | merge | report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from copd import config, evaluate, report, study, train
from copd.branch import Branch
from copd.config import MergeConfig
from copd.merge import merge
from copd.model import load, load_like, load_saved


def eval_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="copd eval", description="Accuracy of saved models on a config's domains.")
    parser.add_argument("models", nargs="+", type=Path, help="folders written by save_pretrained")
    parser.add_argument("--config", type=Path, required=True, help="a run's config.yaml, or the file it came from")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the config")
    args = parser.parse_args(argv)
    for folder in args.models:
        cfg = config.load(args.config, [*args.set, f"model.path={folder}"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load(cfg.model, cfg.seed, device)
        for name, owned in cfg.branches.items():
            task = train.make_task(name, owned, processor)
            branch = Branch(str(folder), [task], model, processor, cfg, device)
            record, _ = evaluate.accuracy(branch, task, cfg.eval.prompts, cfg.eval.samples)
            sampled, greedy = record["accuracy"], record["accuracy_greedy"]
            print(f"{folder}  {name}  accuracy {sampled:.3f}  greedy {greedy:.3f}  ({record['samples']} samples)")


def merge_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="copd merge", description="Merges saved branches into one model.")
    parser.add_argument("branches", nargs="+", type=Path, help="folders written by save_pretrained")
    parser.add_argument("--base", type=Path, help="what they started from; needed by task_arithmetic and ties")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="mean", choices=["mean", "weighted", "task_arithmetic", "ties"])
    parser.add_argument("--weights", nargs="*", type=float, help="one for each branch")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--density", type=float, default=0.2)
    args = parser.parse_args(argv)
    if args.weights and len(args.weights) != len(args.branches):
        parser.error(f"merge: weights must be one for each branch ({len(args.branches)}); got {len(args.weights)}")
    if args.base is None and args.method in ("task_arithmetic", "ties"):
        parser.error(f"merge: base must be given for {args.method}; got none")
    names = [str(folder) for folder in args.branches]
    weights = dict(zip(names, args.weights or [], strict=False))
    try:
        model, processor = load_saved(args.base or args.branches[0])
        states = {name: load_like(Path(name), model, processor).state_dict() for name in names}
        merged = merge(
            model.state_dict(), states, MergeConfig(args.method, weights, scale=args.scale, density=args.density)
        )
    except ValueError as error:
        parser.error(str(error))
    model.load_state_dict(merged)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


def report_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="copd report", description="Writes results.md and report.html of a folder.")
    parser.add_argument("directory", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--output", type=Path, help="where to write, instead of there: all but the runs themselves")
    args = parser.parse_args(argv)
    report.write(args.directory, args.output)


COMMANDS = {
    "train": train.main,
    "study": study.main,
    "eval": eval_main,
    "merge": merge_main,
    "report": report_main,
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        got = argv[0] if argv else "nothing"
        sys.exit(f"copd: command must be one of {', '.join(COMMANDS)}; got {got}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
