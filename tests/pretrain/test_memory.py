"""The queue against a list."""

from __future__ import annotations

import pytest
import torch

from unpoison.pretrain.memory import Queue


def test_rows_start_random_and_of_unit_length() -> None:
    torch.manual_seed(0)
    queue = Queue(7, 3)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(7))
    assert len({tuple(row) for row in queue.rows.tolist()}) == 7


@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_newest_rows_replace_the_oldest(n: int) -> None:
    queue = Queue(7, 2)
    expected, position = list(queue.rows.clone()), 0
    for number in range(6):
        newest = torch.full((n, 2), float(number))
        for row in newest:  # the slow twin: one row after the other
            expected[position % 7] = row
            position += 1
        queue.push(newest)
        assert torch.equal(queue.rows, torch.stack(expected)) and int(queue.position) == position % 7


def test_its_state_is_kept_with_the_modules() -> None:
    assert set(Queue(2, 2).state_dict()) == {"rows", "position"}
