"""Spherical k-means and the one assign(), each against a slow, obvious twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unpoison.errors import ConfigError, ShapeError
from unpoison.functional import clustering
from unpoison.functional.clustering import assign, kmeans, similarity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator(seed)), dim=1)


def blobs(per_blob: int, n_blobs: int, seed: int = 0) -> Tensor:
    centres = torch.eye(n_blobs).repeat_interleave(per_blob, dim=0)
    noise = 0.05 * torch.randn(centres.shape, generator=generator(seed))
    return torch.nn.functional.normalize(centres + noise, dim=1)


def naive_assign(features: Tensor, centroids: Tensor) -> list[int]:
    nearest = []
    for feature in features.double():
        cosines = [float(feature @ c / feature.norm() / c.norm()) for c in centroids.double()]
        nearest.append(cosines.index(max(cosines)))
    return nearest


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 8), st.integers(0, 1000))
def test_assign_agrees_with_its_twin(n: int, k: int, d: int, seed: int) -> None:
    features, centroids = 3 * torch.randn(n, d, generator=generator(seed)), unit_rows(k, d, seed + 1)
    assert assign(features, centroids).tolist() == naive_assign(features, centroids)


def test_ties_go_to_the_lowest_index() -> None:
    assert assign(torch.tensor([[1.0, 1.0]]), torch.eye(2)).tolist() == [0]
    assert assign(torch.ones(1, 3), torch.eye(3)[[2, 0, 1]]).tolist() == [0]


@given(st.floats(1e-3, 1e3))
def test_positive_scaling_changes_nothing(scale: float) -> None:  # invariant 1
    features, centroids = torch.randn(50, 8, generator=generator(2)), unit_rows(7, 8, 3)
    assert torch.equal(assign(features * scale, centroids), assign(features, centroids))


def test_cached_and_recomputed_features_are_assigned_alike() -> None:  # invariant 1
    raw, centroids = torch.randn(50, 8, generator=generator(4)), unit_rows(7, 8, 5)
    cached = torch.nn.functional.normalize(raw, dim=1)
    assert torch.equal(assign(raw, centroids), assign(cached, centroids))
    one_by_one = torch.cat([assign(row[None], centroids) for row in raw])
    assert torch.equal(one_by_one, assign(raw, centroids))


def test_similarity_is_float32_even_under_autocast() -> None:
    features, centroids = unit_rows(5, 64).bfloat16(), unit_rows(3, 64, 1)
    outside = similarity(features, centroids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(features, centroids), outside)
    assert outside.dtype == torch.float32 and outside.abs().max() <= 1 + 1e-6


def test_similarity_refuses_other_shapes() -> None:
    with pytest.raises(
        ShapeError, match=r"features must be \(N, D\) and centroids \(K, D\), got \(2, 3\) and \(4, 5\)"
    ):
        similarity(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ShapeError, match=r"got \(3,\)"):
        similarity(torch.ones(3), torch.ones(4, 3))


@given(st.integers(0, 1000))
def test_one_step_agrees_with_its_twin(seed: int) -> None:
    features, previous = unit_rows(30, 5, seed), unit_rows(4, 5, seed + 1)
    nearest = similarity(features, previous).max(dim=1)
    updated = clustering._update(features, nearest.indices, nearest.values, previous)
    lost = iter(nearest.values.argsort(stable=True).tolist())
    for k in range(4):
        members = [f for f, a in zip(features.double(), nearest.indices.tolist(), strict=True) if a == k]
        mean = sum(members) if members else features[next(lost)].double()
        torch.testing.assert_close(updated[k], (mean / mean.norm()).float(), rtol=1e-4, atol=1e-5)


def test_an_empty_cluster_restarts_on_the_image_farthest_from_its_own_centroid() -> None:
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]), dim=1)
    previous = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    nearest = similarity(features, previous).max(dim=1)
    assert nearest.indices.tolist() == [0, 0, 0]
    updated = clustering._update(features, nearest.indices, nearest.values, previous)
    torch.testing.assert_close(updated[1], features[2])


def test_opposite_features_leave_their_centroid_where_it_was() -> None:
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    previous = torch.tensor([[0.0, 1.0]])
    updated = clustering._update(features, torch.zeros(2, dtype=torch.int64), torch.zeros(2), previous)
    assert torch.equal(updated, previous)


def test_blobs_are_found() -> None:
    clusters = kmeans(blobs(20, 6), 6, generator=generator())
    groups = clusters.assignment.view(6, 20)
    assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len(set(groups[:, 0].tolist())) == 6
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(6))


def test_the_result_is_a_fixed_point_and_repeats_with_its_seed() -> None:
    features = unit_rows(200, 6)
    first = kmeans(features, 9, generator=generator(1), iterations=200)
    assert torch.equal(first.assignment, assign(features, first.centroids))
    nearest = similarity(features, first.centroids).max(dim=1)
    again = clustering._update(features, nearest.indices, nearest.values, first.centroids)
    torch.testing.assert_close(again, first.centroids)
    second = kmeans(features, 9, generator=generator(1), iterations=200)
    assert torch.equal(first.centroids, second.centroids)
    other = kmeans(features, 9, generator=generator(2), iterations=200)
    assert not torch.equal(first.centroids, other.centroids)


def test_iterations_improve_the_objective_and_report_progress() -> None:
    features = unit_rows(300, 6)
    seen: list[tuple[int, int]] = []
    means = []
    for iterations in (1, 3, 20):
        clusters = kmeans(
            features, 8, generator=generator(), iterations=iterations, progress=lambda *at: seen.append(at)
        )
        means.append(float(similarity(features, clusters.centroids).max(dim=1).values.mean()))
    assert means == sorted(means) and means[0] < means[-1]
    assert seen[0] == (1, 1) and (20, 20) not in seen[:4]


def test_inputs_and_the_global_generator_stay_as_they_are() -> None:
    features = unit_rows(40, 4)
    before, state = features.clone(), torch.get_rng_state()
    kmeans(features, 5, generator=generator())
    assert torch.equal(features, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [1, 12])
def test_as_few_and_as_many_clusters_as_possible(k: int) -> None:
    features = unit_rows(12, 5)
    clusters = kmeans(features, k, generator=generator())
    assert len(set(clusters.assignment.tolist())) == k
    if k == 12:
        torch.testing.assert_close(clusters.centroids[clusters.assignment], features)


def test_coinciding_images_do_not_break_it() -> None:
    same = unit_rows(1, 4).expand(10, 4).clone()
    clusters = kmeans(same, 3, generator=generator())
    assert clusters.assignment.tolist() == [clusters.assignment[0]] * 10
    assert torch.isfinite(clusters.centroids).all()
    two = torch.cat((same, unit_rows(1, 4, 9).expand(10, 4)))
    assert len(set(kmeans(two, 5, generator=generator()).assignment.tolist())) == 2


@pytest.mark.parametrize("k", [0, 6])
def test_more_clusters_than_images_are_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=f"{k} clusters for 5 images: expected 1 to 5; lower --clusters"):
        kmeans(unit_rows(5, 3), k, generator=generator())
