"""A minute of `make soak`: the real engine is killed, overloaded, misused and left; every request is accounted for."""

import pytest
from soak_service import soak


@pytest.mark.timeout(400)
def test_a_minute_of_trouble_loses_nothing(tiny_checkpoint, tiny_world):
    account = soak(tiny_checkpoint, tiny_world, 30, kills=1)
    print(account)
    assert account.faults == []
    assert len(account.memory) == 2
    assert all(len(sizes) > 1 for sizes in account.memory.values()), "memory was compared with nothing"
    assert account.kills == len(account.recoveries) == 1
    assert account.outcomes["steady"]["200"] > 20
    for kind, outcome in ("10x overload", "429"), ("malformed", "422"), ("1 ms deadline", "504"), ("left early", "left"):
        assert account.outcomes[kind][outcome] > 0, kind
    assert account.outcomes["3,000 events"]["200"] > 0
