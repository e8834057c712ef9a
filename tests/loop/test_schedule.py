"""Phases that last as long as the overlap they exist to hold."""

import logging

import pytest
from copd_cases import make_config, reward_longer, same, save, weights

from copd.coevolve import coevolve
from copd.lab.start import start
from copd.log import Log
from copd.schedule import by_overlap, fixed
from copd.train import Run, device_of


def phases(cfg, overlaps):
    """All phases, and how often the overlap was measured."""
    given, found, asked = iter(overlaps), [], 0

    def overlap():
        nonlocal asked
        asked += 1
        return next(given)

    govern = by_overlap(cfg.overlap, cfg.steps, overlap)
    for _ in range(cfg.steps + cfg.consolidate.steps):
        found.append(govern(found))
    return "".join(phase[0] for phase in found), asked


def test_the_fixed_schedule_is_algorithm_1():
    assert fixed(2, 3, 2) == (["rl"] * 3 + ["opd"] * 2) * 2


def test_phases_last_until_the_overlap_has_fallen_and_until_it_is_back(tmp_path):
    cfg = make_config(tmp_path, "cycles=6", "overlap.every=2", "overlap.low=0.9", "overlap.high=0.95")
    assert phases(cfg, [0.97, 0.89, 0.93, 0.95, 0.96]) == ("rrrroooorrrr", 5)


def test_a_phase_that_would_never_end_is_cut_with_a_warning(tmp_path, caplog):
    cfg = make_config(tmp_path, "cycles=4", "overlap.every=2", "overlap.longest=3")
    with caplog.at_level(logging.WARNING, logger="copd"):
        assert phases(cfg, [0.99, 0.99, 0.5, 0.5, 0.99]) == ("rrrooorr", 4)
    assert "phase rl ends after overlap.longest = 3 steps at an overlap of 0.990" in caplog.messages


def test_consolidation_follows_the_last_step(tmp_path):
    cfg = make_config(tmp_path, "cycles=1", "consolidate.steps=2", "overlap.every=4")
    assert phases(cfg, [])[0] == "rrcc"


@pytest.mark.parametrize("setting", ["overlap.low=0", "overlap.high=1", "overlap.low=0.95", "overlap.every=0"])
def test_bounds_that_no_overlap_can_meet_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="config: overlap"):
        make_config(tmp_path, setting)


def test_a_resume_takes_the_phases_of_an_uninterrupted_run(tmp_path):
    """A bound that the branches cross back and forth, so that every phase may end at every step."""
    settings = (
        "schedule=overlap",
        "overlap.every=1",
        "overlap.low=0.98",
        "overlap.high=0.98",
        "cycles=3",
        "optim.lr=0.01",
    )

    def begin(name):
        cfg = make_config(tmp_path, *settings, f"name={name}")
        trainer = Run(cfg, *start(cfg, device_of(cfg)))
        for task in trainer.tasks.values():
            task.reward = reward_longer
        return trainer

    whole, half = begin("whole"), begin("half")
    whole.train()
    half.log = Log(half.directory, half.cfg, 6, 0)
    steps = coevolve(half.plan)
    for _ in range(3):
        next(steps)
    half.log.close()
    save(half.directory, 3, half.plan, half.cfg)
    rest = begin("half")
    rest.train()
    assert rest.plan.phases == whole.plan.phases
    assert set(whole.plan.phases) == {"rl", "opd"}
    for a, b in zip(rest.plan.branches, whole.plan.branches, strict=True):
        assert same(weights(a), weights(b))
