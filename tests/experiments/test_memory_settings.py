import json

from qlora_lab.experiments.memory_settings import EXPLAINED, GRID, HELD_OUT, Setting


def test_settings_kept_aside_are_not_in_the_grid():
    assert not set(HELD_OUT) & ({*GRID, *EXPLAINED})
    assert len(set(GRID)) == len(GRID)


def test_a_setting_is_read_from_the_row_that_it_is_written_as():
    for setting in (*GRID, *HELD_OUT, *EXPLAINED):
        row = json.loads(json.dumps({**setting.as_row(), "measured": {}}))
        assert Setting.of_row(row) == setting
