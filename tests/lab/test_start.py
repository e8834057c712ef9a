"""What a run of the lab begins with."""

import pytest
from copd_cases import make_config

from copd.lab.start import make_task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("branches.text.task=audio", "branches.text.task must be one of arithmetic, count, motion, data; got 'audio'"),
        ("branches.text.options.depth=3", "branches.text.options must be arguments of arithmetic"),
    ],
)
def test_a_wrong_task_is_an_error_that_names_it(tmp_path, task, message):
    cfg = make_config(tmp_path, task)
    with pytest.raises(ValueError, match=message):
        make_task("text", cfg.branches["text"], None)
