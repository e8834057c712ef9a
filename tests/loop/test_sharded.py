"""Several ranks a branch: what one process makes of a run, to rounding, with the same tokens sampled."""

import json
import shutil

import pytest
import torch
from copd_cases import CPU, make_config, save
from safetensors.torch import load_file
from test_place import begin, whole_run

from copd import checkpoint, evaluate, train

TWO = ("text", "image")
# AdamW makes a step of lr of a gradient that is rounding alone, unless eps is above it
SETTINGS = (
    "optim.eps=1e-6",
    "rl_steps=2",
    "opd_steps=2",
    "rollout.prompts=5",
    "eval.divergence_every=2",
    "micro_batch_tokens=40",
)
CASES = {
    "reverse": (4, ("opd.signal=reverse", "opd.teacher=phase_start")),
    # in its last step some ranks have images and others not
    "sampled": (4, ("opd.signal=sampled", "rlvr.loss_aggregation=token", "consolidate.steps=1", "opd.batch=split")),
    "mopd": (2, ("method=mopd", "mopd_steps=2", "model.compile=eager")),
    "joint-mopd": (2, ("method=mopd", "mopd_steps=2", "mixed_batch=joint", "opd.signal=forward")),
    "expert": (4, ("method=expert", "cycles=1")),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_a_branch_make_the_run_of_one_process(case, tmp_path, ranks):
    size, settings = CASES[case]
    for folder, number in (("alone", 1), ("together", size)):
        ranks(number, whole_run, tmp_path / folder, (*SETTINGS, *settings), TWO)
    assert_same_run(tmp_path)


def cut_run(folder, settings):
    """A run in which the last two of four completed prompts are truncated: all that the second of two ranks has."""
    cfg = make_config(folder, *settings)
    trainer = train.Run(cfg, *begin(cfg, CPU))
    (branch,) = trainer.plan.branches
    rollout = branch.rollout

    def cut(*given, first=0, **options):
        made = rollout(*given, first=first, **options)
        made.truncated[max(0, 2 - first) * cfg.rollout.samples :] = True
        return made

    branch.rollout = cut
    trainer.finish(trainer.train())


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_rank_whose_tokens_are_all_masked_takes_part(tmp_path, ranks, aggregation):
    settings = ("method=mixed", "mixed_steps=2", f"rlvr.loss_aggregation={aggregation}", "rollout.prompts=4")
    for folder, number in (("alone", 1), ("together", 2)):
        ranks(number, cut_run, tmp_path / folder, (*SETTINGS, *settings))
    assert_same_run(tmp_path)


def assert_same_run(tmp_path):
    """To rounding, with the same tokens: the run of one process, in `alone`, and that of several, in `together`."""
    alone, together = (
        [json.loads(line) for line in (tmp_path / folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for folder in ("alone", "together")
    )
    assert any(record.get("grad_norm", 0) > 0 for record in alone)
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        for name in ("tokens", "rollouts", "reward", "num_tokens", "completions/mean_length"):
            assert a.get(name) == b.get(name), (a["step"], name)
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4, abs=1e-6), (a["step"], name)
    for path in (tmp_path / "alone" / "run").glob("*/model.safetensors"):
        theirs = tmp_path / "together" / path.relative_to(tmp_path / "alone")
        assert (theirs.parent / "config.json").read_text() == (path.parent / "config.json").read_text()
        ours = load_file(theirs)
        for name, value in load_file(path).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5, msg=f"{path} {name}")


def evaluated(folder, prompts, fails=False):
    """What a model of these ranks scores on test prompts, how many this one samples; or what a reward of one raises."""
    trainer = train.Run(cfg := make_config(folder, "method=mixed", "eval.shown=3"), *begin(cfg, CPU))
    branch, task, asked = trainer.plan.branches[0], trainer.tasks["text"], []
    rollout, reward = branch.rollout, task.reward
    branch.rollout = lambda rows, *rest, **options: asked.append(len(rows)) or rollout(rows, *rest, **options)
    task.reward = lambda *given: 1 / 0 if fails and branch.peers.index else reward(*given)
    if not fails:
        return *evaluate.accuracy(branch, task, prompts, 2), asked
    with pytest.raises(ZeroDivisionError):
        evaluate.accuracy(branch, task, prompts, 2)


def test_ranks_of_a_branch_share_the_prompts_of_an_evaluation(tmp_path, ranks):
    for prompts, shares in ((5, [2, 3]), (1, [1, 1])):  # a rank alone where there is not one for each
        ((*alone, _),) = ranks(1, evaluated, tmp_path, prompts)
        for (*found, asked), share in zip(ranks(2, evaluated, tmp_path, prompts), shares, strict=True):
            assert asked == [share, share]
            assert found == alone
    assert ranks(2, evaluated, tmp_path, 5, True, seconds=90) == [None, None]


def saved_again(folder, source, target):
    """On every rank: goes on from the checkpoint in one folder, and writes it into another."""
    cfg = make_config(folder, *SETTINGS, "opd.teacher=phase_start", domains=TWO)
    plan = train.Run(cfg, *begin(cfg, CPU)).plan
    step = checkpoint.resume(folder / source, plan, cfg)
    return save(folder / target, step, plan, cfg)


def test_a_checkpoint_passes_through_shards_bit_for_bit(tmp_path, ranks):
    """What one process saved in the middle of a phase, frozen teachers included, by two ranks a branch to one each."""
    settings = (*SETTINGS, "opd.teacher=phase_start", "checkpoint_every=3")
    ranks(1, whole_run, tmp_path, settings, TWO)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    path, *_ = ranks(4, saved_again, tmp_path, "run", "shards")
    back, *_ = ranks(2, saved_again, tmp_path, "shards", "back")
    for name in TWO:
        (before,) = (tmp_path / "run" / "checkpoint-3" / f"branch-{name}").iterdir()
        first, second = map(load_file, sorted((path / f"branch-{name}").iterdir()))
        saved = load_file(before)
        assert {key.partition(".")[0] for key in saved} == {"weights", "frozen", "step", "exp_avg", "exp_avg_sq"}
        (after,) = map(load_file, (back / f"branch-{name}").iterdir())
        assert saved.keys() == after.keys() == first.keys() | second.keys()
        for key, value in saved.items():
            halves = [half[key] for half in (first, second) if key in half]
            assert torch.equal(torch.cat(halves) if value.dim() else halves[0], value), key
            assert torch.equal(after[key], value), key
            assert len(halves) == 1 or len(halves[1]) <= len(halves[0]) < len(value)
