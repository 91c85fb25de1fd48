"""Requests that are computed together."""

import asyncio
import threading

import pytest

from lgd.serve.batches import Batches


class Squares:
    """Computes when it may, and keeps what it was asked."""

    def __init__(self):
        self.batches, self.may = [], threading.Semaphore(0)

    def __call__(self, asked):
        assert self.may.acquire(timeout=30)
        self.batches.append(asked)
        if 13 in asked:
            raise ValueError("13")
        return [number**2 for number in asked]


def run_all(squares, asked, work=None):
    """What comes of requests of which the first is being computed when the others come."""

    async def ask():
        batches = Batches(squares, 4)
        tasks = [asyncio.create_task(batches.ask(asked[0]))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(batches.ask(one)) for one in asked[1:]]
        await asyncio.sleep(0.05)
        if work:
            work(tasks)
        squares.may.release(len(asked))
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(ask())


def test_what_comes_meanwhile_is_computed_together():
    squares = Squares()
    assert run_all(squares, list(range(8))) == [number**2 for number in range(8)]
    assert squares.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_batch_that_fails_fails_alone():
    squares = Squares()
    answers = run_all(squares, [1, 2, 13, 3, 4, 5])
    assert squares.batches == [[1], [2, 13, 3, 4], [5]]
    assert [answers[0], answers[5]] == [1, 25]
    assert all(isinstance(one, ValueError) for one in answers[1:5])


def test_what_nobody_waits_for_is_not_computed():
    squares = Squares()
    answers = run_all(squares, [1, 2, 3], lambda tasks: [tasks[number].cancel() for number in (0, 1)])
    assert squares.batches == [[1], [3]] and answers[2] == 9
    assert all(isinstance(one, asyncio.CancelledError) for one in answers[:2])


def test_too_few_answers_leave_nobody_waiting():
    async def ask():
        return await Batches(lambda asked: [], 4).ask(1)

    with pytest.raises(ValueError, match="shorter"):
        asyncio.run(ask())
