"""TRL's losses on two ranks, under DDP and FSDP2: the gradients of TRL's own code under DDP."""

import copy

import pytest
import torch
import torch.distributed as dist

trl = pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("transformers")

WRAPPERS = ("DDP", "FSDP2", "FSDP2, lm_head a unit of its own")


def wrap(model, how):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if how == "DDP":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if how != "FSDP2":
        fully_shard(model.lm_head)
    return fully_shard(model)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(model):
    found = {name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def of_my_half(inputs):
    half = slice(None, 2) if dist.get_rank() == 0 else slice(2, None)
    return {name: x[half] if torch.is_tensor(x) and x.dim() else x for name, x in inputs.items()}


def worst(ours, theirs):
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def grpo_errors(folder):
    """Of each wrapper: the largest relative error of a parameter's gradient."""
    from pathlib import Path

    import trl_cases as cases

    from copd_kernels.trl import GRPOTrainer, fuse

    folder = Path(folder) / str(dist.get_rank())
    tokenizer = cases.make_tokenizer()

    def step(trainer, how):
        trainer.current_gradient_accumulation_steps = 1
        inputs = of_my_half(cases.grpo_inputs(trainer, trainer.model))
        model = wrap(trainer.model, how).train()
        trainer._compute_loss(model, inputs).backward()
        return gradients(model)

    def make(*args, **options):  # without a reference model, which rank 0 alone would save
        return cases.grpo(tokenizer, folder, *args, settings={"beta": 0.0}, **options)

    want = step(make(), "DDP")
    found = {how: worst(step(fuse(make()), how), want) for how in WRAPPERS}
    # live teachers are of no rank's own: each rank reads them all, also where they are sharded
    teachers = [cases.build(seed=1), cases.build("Granite", seed=2)]
    want = step(make(GRPOTrainer, teachers=copy.deepcopy(teachers)), "DDP")
    for how in WRAPPERS:
        sharded = [wrap(copy.deepcopy(teacher), how) for teacher in teachers]
        found[f"{how}, teachers too"] = worst(step(make(GRPOTrainer, teachers=sharded), how), want)
    return found


def distillation_errors(folder):
    import trl_cases as cases

    from copd_kernels.trl import DistillationTrainer

    tokenizer, teachers = cases.make_tokenizer(), [cases.build(seed=1), cases.build("Granite", seed=2)]

    def step(trainer, how):
        trainer.teachers = [wrap(teacher, how) for teacher in getattr(trainer, "teachers", [])]
        model = wrap(trainer.model, how).train()
        # as the trainer trains: the loss inside the wrapper's forward
        trainer.compute_loss(model, of_my_half(cases.rollouts() | {"num_items_in_batch": None}) | extra).backward()
        return gradients(model)

    def make(cls, teacher, **options):
        return cases.distillation(tokenizer, folder, copy.deepcopy(teacher), cls, 0.5, **options)

    extra = {}
    each = [step(make(trl.DistillationTrainer, teacher), "DDP") for teacher in teachers]
    want = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    found = {how: worst(step(make(DistillationTrainer, teachers), how), want) for how in WRAPPERS}
    # rank 0's rows have the first teacher, rank 1's the second: each rank runs one that it has no row for
    extra = {"teacher_index": torch.full((2,), dist.get_rank())}
    routed = [step(make(DistillationTrainer, teachers, route="domain"), how) for how in WRAPPERS]
    mine = trl.DistillationTrainer
    want = step(make(mine, teachers[dist.get_rank()]), "DDP")
    return found | {f"{how}, routed": worst(x, want) for how, x in zip(WRAPPERS, routed, strict=True)}


@pytest.mark.parametrize("errors", [grpo_errors, distillation_errors])
def test_gradients_of_two_ranks_are_trls(ranks, tmp_path, errors):
    # importing trl takes its time on a busy machine
    for found in ranks(2, errors, str(tmp_path), seconds=400):
        assert len(found) == 2 * len(WRAPPERS)
        assert max(found.values()) < 2e-6, found
