"""The `copd` command: train | study | eval | merge | report."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import transformers
from safetensors import SafetensorError

from copd import engine, evaluate, files, ranks, schema, train
from copd.branch import Branch, NonFiniteLoss
from copd.lab import report, study, suite
from copd.lab.config import LabConfig
from copd.lab.start import make_task, start
from copd.lab.tasks import vocabulary
from copd.merge import merge
from copd.model import is_adapter, load, load_like, load_saved
from copd.processor import load_processor
from copd.settings import MergeConfig
from copd.train.health import Unhealthy


def run_train(args: argparse.Namespace, cfg: LabConfig) -> None:
    if args.dry_run:
        print(schema.dump(cfg), end="")
        check(cfg)
        return
    first = ranks.number() == 0
    prefix = "" if first else f"rank {ranks.number()}: "
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format=f"{prefix}%(message)s")
    transformers.utils.logging.disable_progress_bar()
    results = train.run(cfg, start)
    if not first:
        return
    report.write(cfg.run_dir)
    for name, domains in results["final"].items():
        print(f"{name:>10}  " + "  ".join(f"{domain} {suite.value(record):.3f}" for domain, record in domains.items()))
    print(f"{cfg.run_dir}: results.json, results.md, report.html")


def check(cfg: LabConfig) -> None:
    """What can be known without the weights: data, rewards, tokenizer, trackers. Raises what a run would."""
    processor = load_processor(cfg.model.path) if cfg.model.path else vocabulary.tokenizer()
    for name, owned in cfg.branches.items():
        make_task(name, owned, processor).prompt(0)
    engine.check(cfg.rollout)
    for name in cfg.report_to:
        if find_spec(name) is None:
            raise ImportError(f"config: report_to must name installed packages; got {name}, which is not")


def run_study(args: argparse.Namespace, plan: study.Study) -> None:
    failed, directory = study.run(plan), Path(plan.output_dir)
    if any(not files.is_aside(path) for path in directory.glob("*/*/results.json")):
        report.write(directory)
        print((directory / "results.md").read_text())
        print(f"{directory}: results.json, results.md, report.html")
    if failed:
        sys.exit("\n".join(["study: failed:", *map(study.ending, failed)]))


def run_eval(args: argparse.Namespace, cfg: LabConfig) -> None:
    device = train.device_of(cfg)
    sampler = None  # one: the models differ in their weights alone
    for folder in args.models:
        model, processor = load(replace(cfg.model, path=folder), device)
        model.requires_grad_(False)
        sampler = sampler or engine.make(replace(cfg, model=replace(cfg.model, adapter=None)), model, processor)
        for name, owned in cfg.branches.items():
            task = make_task(name, owned, processor)
            branch = Branch(folder, [task], model, processor, cfg, device, sampler)
            record, _ = evaluate.accuracy(branch, task, cfg.eval.prompts, cfg.eval.samples)
            what = "accuracy" if "accuracy" in record else "reward"
            sampled, greedy = record[what], record[f"{what}_greedy"]
            print(f"{folder}  {name}  {what} {sampled:.3f}  greedy {greedy:.3f}  ({record['samples']} samples)")


def run_merge(args: argparse.Namespace, cfg: MergeConfig) -> None:
    kinds = {is_adapter(folder) for folder in args.branches}
    if kinds == {True}:
        from copd import merge_adapters  # peft, which it imports, takes a second

        with files.whole(Path(args.out)) as scratch:
            merge_adapters.merge_folders(args.branches, args.base, cfg, scratch)
        return
    if cfg.into == "adapter":
        sys.exit("merge: branches must be adapters to become one; got a whole model")
    if args.base is None and cfg.method in ("task_arithmetic", "ties"):
        sys.exit(f"merge: base must be given for {cfg.method}; got none")
    model, processor = load_saved(args.base or args.branches[0])
    states = {folder: load_like(Path(folder), model, processor).state_dict() for folder in args.branches}
    model.load_state_dict(merge(model.state_dict(), states, cfg))
    with files.whole(Path(args.out)) as scratch:
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)


def run_report(args: argparse.Namespace, cfg: None) -> None:
    report.write(args.directories, args.output, args.readme)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="copd")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Callable[..., None], schema: type | None, text: str) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("run_")
        hint = "key=value arguments after these override single settings" if schema else None
        added = commands.add_parser(name, help=text, description=text, epilog=hint)
        added.set_defaults(run=run, schema=schema, config=None)
        return added

    sub = command(run_train, LabConfig, "train one run")
    sub.add_argument("--config", help="YAML file over the defaults of copd/config.py and copd/lab/config.py")
    sub.add_argument("--dry-run", action="store_true", help="print the resolved config, check what it names, and stop")
    sub = command(run_study, study.Study, "run all methods, suites and seeds")
    sub.add_argument("--config", required=True)
    sub = command(run_eval, LabConfig, "accuracy of saved models on a config's domains")
    sub.add_argument("models", nargs="+", help="folders of models, or of adapters")
    sub.add_argument("--config", required=True, help="a run's config.yaml, or the file it came from")
    sub = command(
        run_merge,
        MergeConfig,
        "merge saved branches; settings are method, weights (by folder), scale, density, and into, rank of adapters",
    )
    sub.add_argument("branches", nargs="+", help="folders of models, or of adapters of one base")
    sub.add_argument("--base", help="what they started from; needed by task_arithmetic and ties of whole models")
    sub.add_argument("--out", required=True)
    sub = command(run_report, None, "write tables, figures and page of finished runs")
    sub.add_argument("directories", nargs="+", type=Path, help="a run, folders of runs, or what was reported of some")
    sub.add_argument("--output", type=Path, help="where to write, instead of the first: all but the runs themselves")
    sub.add_argument("--readme", type=Path, help="a file whose part between <!-- study --> marks becomes the summary")

    args, overrides = parser.parse_known_args(argv)
    if overrides and not args.schema:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        cfg = schema.load(args.schema, args.config, overrides) if args.schema else None
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        args.run(args, cfg)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, ImportError, NonFiniteLoss, Unhealthy) as error:
        if os.environ.get("COPD_DEBUG"):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"copd: {reason} (COPD_DEBUG=1 shows where)")
