"""A run that is killed again and again, while saving too, ends as one that was not (a longer one: kill_many.py)."""

from kill_many import Killer


def test_killed_many_times(data, teacher, tmp_path):
    killer = Killer(data, teacher, tmp_path, seed=1)

    def in_saving():
        return sum(kill.is_in_saving for kill in killer.kills)

    # the moments are random: it goes on until enough of them were in saving
    while len(killer.kills) < 12 or (in_saving() < 3 and len(killer.kills) < 60):
        killer.run_to_the_end()
    assert in_saving() >= 3
    assert max(kill.lost for kill in killer.kills) <= 1  # it saves after every update
