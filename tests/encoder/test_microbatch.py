import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clusterbatch.encoder.tokens import micro_batches

_lengths = st.lists(st.integers(0, 300), max_size=200).map(lambda lengths: np.array(lengths, np.int64))


@given(_lengths, st.integers(1, 1000))
def test_every_row_once_and_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(1, int(lengths[batch].max()))
        assert padded <= budget or len(batch) == 1


@given(_lengths, st.integers(1, 1000))
def test_without_padding_only_tokens_count(lengths: np.ndarray, budget: int) -> None:
    batches = micro_batches(lengths, budget, padded=False)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    sums = [int(np.maximum(lengths[batch], 1).sum()) for batch in batches]
    assert all(tokens <= budget or len(batch) == 1 for batch, tokens in zip(batches, sums, strict=True))
    # The first row of the next one would not have fitted.
    for tokens, following in zip(sums[:-1], batches[1:], strict=True):
        assert tokens + max(1, int(lengths[following[0]])) > budget


@given(_lengths)
def test_rows_of_like_length_go_together(lengths: np.ndarray) -> None:
    batches = micro_batches(lengths, 512)
    in_order = [int(length) for batch in batches for length in np.maximum(lengths[batch], 1)]
    assert in_order == sorted(in_order, reverse=True)


def test_little_padding_on_lengths_of_text() -> None:
    # They are about log-normal.
    lengths = np.clip(np.random.default_rng(0).lognormal(4.3, 0.9, 4000), 3, 256).astype(int)
    padded = sum(len(batch) * lengths[batch].max() for batch in micro_batches(lengths, 4096))
    assert padded < 1.05 * lengths.sum()
