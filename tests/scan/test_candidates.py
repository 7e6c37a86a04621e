"""Candidates: rows stay together whatever is taken, compared, joined or stored."""

from __future__ import annotations

from dataclasses import fields

import torch

from unpoison.scan.candidates import Candidates
from unpoison.scan.flip_test import Flips


def candidates(n: int, seed: int = 0) -> Candidates:
    drawn = torch.Generator().manual_seed(seed)
    flips = Flips(
        torch.rand(n, generator=drawn),
        torch.rand(n, 4, generator=drawn),
        torch.rand(n, 4, generator=drawn),
        torch.rand(n, 6, generator=drawn),
    )
    patches = torch.randint(0, 256, (n, 3, 5, 5), dtype=torch.uint8, generator=drawn)
    corners = torch.randint(0, 9, (n, 2), generator=drawn)
    return Candidates(torch.arange(n) + 100 * seed, torch.arange(n) % 4, corners, patches, flips)


def same(a: Candidates, b: Candidates) -> bool:
    first, second = a.to_tensors(), b.to_tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_take_moves_every_field_alike() -> None:
    found = candidates(5)
    taken = found.take(torch.tensor([3, 0, 3]))
    assert len(taken) == 3 and taken.rows.tolist() == [3, 0, 3]
    for place, row in enumerate((3, 0, 3)):
        assert torch.equal(taken.patches[place], found.patches[row])
        assert torch.equal(taken.corners[place], found.corners[row])
        assert taken.own[place] == found.own[row]
        for field in fields(Flips):
            assert torch.equal(getattr(taken.flips, field.name)[place], getattr(found.flips, field.name)[row])


def test_concatenating_keeps_the_order() -> None:
    first, second = candidates(3), candidates(2, seed=1)
    joined = Candidates.concatenate([first, second])
    assert joined.rows.tolist() == [0, 1, 2, 100, 101]
    assert same(joined.take(torch.arange(3)), first) and same(joined.take(torch.arange(3, 5)), second)


def test_the_better_window_wins_and_the_first_one_keeps_a_tie() -> None:
    first, second = candidates(3), candidates(3, seed=1)
    best = first.better_of(second, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0]))
    assert torch.equal(best.patches[0], second.patches[0])
    assert torch.equal(best.patches[1:], first.patches[1:])


def test_it_survives_the_cache() -> None:
    found = candidates(4, seed=2)
    tensors = found.to_tensors()
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    assert same(Candidates.from_tensors(tensors), found)
