import sys

import pytest

from flexdistill import progress
from flexdistill.progress import stage_progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_line_a_minute_tells_the_time_left(clock, capsys):
    with stage_progress("attention_transfer", 100, 10) as update:
        for step in range(11, 16):
            clock.now += 24
            update(step, loss=1 / 3, tokens_per_s=12345.6)
    lines = capsys.readouterr().err.splitlines()
    # 87 steps of 24 seconds
    assert lines == ["attention_transfer 13/100  loss 0.3333  tokens_per_s 1.235e+04  0:34:48 left"]


def test_short_stages_and_other_processes_print_nothing(clock, capsys):
    for enabled, seconds in ((True, 1), (False, 1000)):
        with stage_progress("logit_distillation", 5, enabled=enabled) as update:
            for step in range(1, 6):
                clock.now += seconds
                update(step, loss=1.0)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with stage_progress("label_training", 3) as update:
        update(2, loss=0.5)
    assert "label_training" in capsys.readouterr().err
