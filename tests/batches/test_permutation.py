import numpy as np
import pytest

from clusterbatch.batches.permutation import combine_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 17, 4096, 4097, 5000, 65_536, 100_003])
def test_is_a_permutation(size: int) -> None:
    image = permute(np.arange(size), size, 1, 2)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1000, 100_003])
def test_any_subset_gives_the_same_answer_as_all_at_once(size: int) -> None:
    everything = permute(np.arange(size), size, 5)
    some = np.random.default_rng(0).integers(0, size, 100)
    assert np.array_equal(permute(some, size, 5), everything[some])


@pytest.mark.parametrize("size", [1000, 100_003])
def test_keys_give_unrelated_orders(size: int) -> None:
    first, second = permute(np.arange(size), size, 0, 1), permute(np.arange(size), size, 1, 0)
    # Two independent permutations share one fixed point on average.
    assert np.sum(first == second) < 10
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_images_are_spread_evenly() -> None:
    # A thousand neighbouring positions of a million should fall evenly into ten bins: chi-square with 9 degrees.
    image = permute(np.arange(1000), 10**6, 3)
    counts = np.bincount(image // 10**5, minlength=10)
    assert np.sum((counts - 100) ** 2 / 100) < 33.7  # p = 0.0001


def test_huge_domain_is_cheap_and_inside() -> None:
    image = permute(np.arange(10_000), 10**12 + 39, 4)
    assert image.min() >= 0
    assert image.max() < 10**12 + 39
    assert len(np.unique(image)) == 10_000


def test_order_of_key_parts_matters() -> None:
    assert combine_key(1, 2) != combine_key(2, 1)
    assert combine_key(1) != combine_key(1, 0)
