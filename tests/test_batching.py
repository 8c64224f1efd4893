"""Who waits is worked on together, nobody waits for company, and one's fault, haste or leaving is nobody else's."""

import threading
from concurrent.futures import CancelledError

import pytest

from hstu_lab.batching import Batcher, BatcherClosed


class Work:
    """Doubles numbers, notes the batches, and stands still while `gate` is closed. A negative number is refused."""

    def __init__(self):
        self.batches, self.gate, self.begun = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, numbers):
        self.batches.append(numbers)
        self.begun.set()
        assert self.gate.wait(30)
        if bad := [n for n in numbers if n < 0]:
            raise ValueError(f"{bad[0]} is negative")
        return [2 * n for n in numbers]

    def stand_still(self, batcher):
        """The future of a request that is being worked on until the gate opens."""
        self.gate.clear()
        self.begun.clear()
        future = batcher.submit(0)
        assert self.begun.wait(30)
        return future


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def batcher(work):
    batcher = Batcher(work, 4)
    yield batcher
    work.gate.set()
    batcher.close()


def test_one_alone_waits_for_nobody(work, batcher):
    for n in range(5):
        assert batcher.submit(n).result(30) == 2 * n
    assert work.batches == [[0], [1], [2], [3], [4]]
    assert batcher.sizes == {1: 5}


def test_those_that_come_meanwhile_form_the_next_batches_in_order(work, batcher):
    first = work.stand_still(batcher)
    others = [batcher.submit(n) for n in range(1, 11)]
    assert not any(future.done() for future in (first, *others))
    work.gate.set()
    assert [future.result(30) for future in others] == list(range(2, 22, 2))
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert batcher.sizes == {1: 1, 4: 2, 2: 1}


def test_a_fault_reaches_only_whose_it_is(work, batcher):
    work.stand_still(batcher)
    futures = {n: batcher.submit(n) for n in (1, -2, 3, 4)}
    work.gate.set()
    assert [futures[n].result(30) for n in (1, 3, 4)] == [2, 6, 8]
    with pytest.raises(ValueError, match="-2 is negative"):
        futures[-2].result(30)
    assert work.batches[1:] == [[1, -2, 3, 4], [1, -2], [1], [-2], [3, 4]]
    assert batcher.submit(5).result(30) == 10, "it goes on afterwards"


def test_who_leaves_before_the_batch_begins_is_left_out(work, batcher):
    work.stand_still(batcher)
    futures = [batcher.submit(n) for n in range(1, 5)]
    assert futures[1].cancel()
    work.gate.set()
    assert [futures[i].result(30) for i in (0, 2, 3)] == [2, 6, 8]
    with pytest.raises(CancelledError):
        futures[1].result(30)
    assert work.batches[1] == [1, 3, 4]


def test_who_leaves_later_disturbs_nobody(work, batcher):
    first = work.stand_still(batcher)
    assert not first.cancel(), "it is being worked on"
    work.gate.set()
    assert batcher.submit(7).result(30) == 14


def test_answers_that_are_too_few_are_an_error_and_no_hang():
    batcher = Batcher(lambda requests: [], 4)
    with pytest.raises(ValueError, match="shorter"):
        batcher.submit(1).result(30)
    batcher.close()


def test_closing_answers_what_waits(work):
    batcher = Batcher(work, 2, "ranking")
    work.stand_still(batcher)
    futures = [batcher.submit(n) for n in range(1, 6)]
    threading.Timer(0.05, work.gate.set).start()
    batcher.close()
    assert [future.result(0) for future in futures] == [2, 4, 6, 8, 10]
    with pytest.raises(BatcherClosed, match="ranking is closed"):
        batcher.submit(1)


def test_a_batch_of_nobody_is_refused(work):
    with pytest.raises(ValueError, match="most is 0"):
        Batcher(work, 0)
