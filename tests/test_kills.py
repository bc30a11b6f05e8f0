"""A run that is killed again and again, while saving too, ends as one that was not (a longer one: kill_many.py)."""

from kill_many import Killer


def test_killed_many_times(data, teacher, tmp_path):
    killer = Killer(data, teacher, tmp_path, seed=1)
    while len(killer.kills) < 12:
        killer.run_to_the_end()
    assert sum(kill.is_in_saving for kill in killer.kills) >= 3
    assert max(kill.lost for kill in killer.kills) <= 1  # it saves after every update
