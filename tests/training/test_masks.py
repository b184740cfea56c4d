"""What is positive, negative and ignored, on batches small enough to see."""

from __future__ import annotations

import pytest
import torch

from clusterbatch.config import MaskConfig
from clusterbatch.training.masks import IGNORED as I
from clusterbatch.training.masks import NEGATIVE as N
from clusterbatch.training.masks import POSITIVE as P
from clusterbatch.training.masks import BatchFacts, Relation, limit

_NO_SCORES = torch.zeros(3, 3)
_ALL = slice(0, 3)


def _facts(query_hash: list[int], document_hash: list[int], **more: torch.Tensor) -> BatchFacts:
    return BatchFacts(torch.tensor(query_hash), torch.tensor(document_hash), **more)


def test_duplicates_are_ignored_by_hash_and_the_pair_itself_is_positive() -> None:
    facts = _facts([1, 1, 3], [7, 8, 7])
    block = Relation(MaskConfig(), facts).block(_ALL, _ALL, _NO_SCORES)
    # Row 0 says that the document of row 2 answers the query of row 1, too.
    assert block.tolist() == [[P, I, I], [I, P, I], [I, N, P]]


def test_parts_of_one_document_are_no_negatives_of_each_other() -> None:
    facts = _facts([1, 2, 3], [7, 8, 9], document_id=torch.tensor([5, 6, 5]))
    relation = Relation(MaskConfig(), facts)
    assert relation.block(_ALL, _ALL, _NO_SCORES).tolist() == [[P, N, I], [N, P, N], [I, N, P]]
    assert relation.queries_block(_ALL, _ALL, _NO_SCORES).tolist() == [[I, N, I], [N, I, N], [I, N, I]]
    off = Relation(MaskConfig(same_document=False), facts)
    assert off.block(_ALL, _ALL, _NO_SCORES).tolist() == [[P, N, N], [N, P, N], [N, N, P]]


def test_without_the_duplicate_mask_they_are_negatives() -> None:
    block = Relation(MaskConfig(duplicates=False), _facts([1, 1, 3], [7, 8, 7])).block(_ALL, _ALL, _NO_SCORES)
    assert block.tolist() == [[P, N, N], [N, P, N], [N, N, P]]


def test_equal_vectors_are_not_duplicates() -> None:
    """Trap 9: dropout makes the vectors of equal texts differ, and different texts may come close."""
    facts = _facts([1, 2, 3], [7, 8, 9])
    block = Relation(MaskConfig(), facts).block(_ALL, _ALL, torch.ones(3, 3))
    assert block.tolist() == [[P, N, N], [N, P, N], [N, N, P]]


def test_documents_of_equal_queries_count_as_positives_on_request() -> None:
    config = MaskConfig(same_query_is_positive=True)
    block = Relation(config, _facts([1, 1, 3], [7, 8, 7])).block(_ALL, _ALL, _NO_SCORES)
    assert block.tolist() == [[P, P, I], [P, P, I], [I, N, P]]


def test_surrogate_ignores_what_it_scores_above_the_pair_itself() -> None:
    # Positives score 0.6, 0.8 and 1.0.
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    document = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    facts = _facts([1, 2, 3], [7, 8, 9], query_vector=query, document_vector=document)
    for margin, expected in (
        (0.1, [[P, I, N], [N, P, N], [N, N, P]]),
        (0.3, [[P, N, N], [N, P, N], [N, N, P]]),
        (-0.25, [[P, I, N], [I, P, N], [I, N, P]]),
    ):
        relation = Relation(MaskConfig(surrogate_margin=margin), facts)
        assert relation.block(_ALL, _ALL, _NO_SCORES).tolist() == expected, margin


def test_a_relative_margin_is_a_share_of_the_positive_and_means_the_same_for_negative_scores() -> None:
    positive = torch.tensor([0.8, -0.4])
    assert torch.allclose(limit(positive, -0.05, True), torch.tensor([0.76, -0.42]))
    assert torch.allclose(limit(positive, 0.05, False), torch.tensor([0.85, -0.35]))


def test_own_scores_ignore_what_the_model_ranks_above_the_pair_by_more_than_the_margin() -> None:
    scores = torch.tensor([[0.5, 0.59, 0.61], [0.9, 0.2, 0.25], [0.0, 0.0, 0.3]])
    relation = Relation(MaskConfig(own_score_margin=0.1), _facts([1, 2, 3], [7, 8, 9]), scores.diagonal())
    assert relation.block(_ALL, _ALL, scores).tolist() == [[P, N, I], [I, P, N], [N, N, P]]


def test_a_block_is_a_block_of_the_whole() -> None:
    """Every mask at once; chunks of rows and columns, as ranks and the chunked loss ask for them."""
    torch.manual_seed(0)
    rows = 12
    query, document = (torch.nn.functional.normalize(torch.randn(rows, 4), dim=1) for _ in range(2))
    facts = BatchFacts(torch.arange(rows) // 2, torch.arange(rows) % 5, query_vector=query, document_vector=document)
    scores = torch.rand(rows, rows)
    config = MaskConfig(surrogate_margin=0.1, own_score_margin=0.05)
    relation = Relation(config, facts, scores.diagonal())
    whole = relation.block(slice(0, rows), slice(0, rows), scores)
    for queries in (slice(0, 5), slice(5, 12)):
        for documents in (slice(0, 7), slice(7, 12)):
            block = relation.block(queries, documents, scores[queries, documents])
            assert torch.equal(block, whole[queries, documents])
    assert {int(value) for value in whole.unique()} == {N, P, I}


def test_hard_negatives_that_are_the_rows_own_document_are_ignored() -> None:
    facts = _facts(
        [1, 2, 3],
        [7, 8, 9],
        negative_hash=torch.tensor([70, 81]),
        document_token_hash=torch.tensor([70, 80, 90]),
    )
    block = Relation(MaskConfig(), facts).block(_ALL, slice(3, 5), torch.zeros(3, 2))
    assert block.tolist() == [[I, N], [N, N], [N, N]]


def test_other_queries_are_negatives_but_for_the_query_itself_and_its_duplicates() -> None:
    block = Relation(MaskConfig(), _facts([1, 1, 3], [7, 8, 9])).queries_block(_ALL, _ALL, _NO_SCORES)
    assert block.tolist() == [[I, I, N], [I, I, N], [N, N, I]]


def test_a_hard_negative_that_answers_the_same_query_in_another_row_is_ignored() -> None:
    """Rows 0 and 2 ask the same; the negative with hash 90 is the document of row 2, that with 80 of row 1."""
    facts = _facts(
        [1, 2, 1],
        [7, 8, 9],
        negative_hash=torch.tensor([90, 80, 55]),
        document_token_hash=torch.tensor([70, 80, 90]),
    )
    relation = Relation(MaskConfig(), facts)
    whole = relation.block(_ALL, slice(3, 6), _NO_SCORES)
    assert whole.tolist() == [[I, N, N], [N, I, N], [I, N, N]]
    for row in range(3):
        part = relation.block(slice(row, row + 1), slice(3, 6), _NO_SCORES[:1])
        assert torch.equal(part, whole[row : row + 1])


_MANY = slice(0, 64)


def _random_facts(seed: int) -> BatchFacts:
    """Rows that share queries, documents and books, hard negatives among them; a text may be in several books."""
    random = torch.Generator().manual_seed(seed)
    query, document, book, negative = (torch.randint(0, most, (64,), generator=random) for most in (40, 30, 12, 60))
    # Texts are known by two hashes.
    return BatchFacts(query, document + 100, negative + 200, document + 200, document_id=book)


@pytest.mark.parametrize("off", [[], ["duplicates"], ["same_document"]])
@pytest.mark.parametrize("seed", range(5))
def test_no_text_is_a_negative_that_any_row_of_the_batch_calls_an_answer_or_a_part(seed: int, off: list[str]) -> None:
    facts = _random_facts(seed)
    config = MaskConfig.model_validate(dict.fromkeys(off, False))
    query, document, book = (each.tolist() for each in (facts.query_hash, facts.document_hash, facts.document_id))
    keys = [key for name, key in (("duplicates", query), ("same_document", book)) if name not in off]
    columns = document + [text - 100 for text in facts.negative_hash.tolist()]
    expected = []
    for row in range(64):
        texts = {document[row]} if "duplicates" not in off else set()
        for key in keys:
            of_key = [other for other in range(64) if key[other] == key[row]]
            texts |= {document[other] for other in of_key if len(of_key) > 1}
        found = [I if text in texts or _alike(keys, row, place) else N for place, text in enumerate(columns)]
        expected.append([P if place == row else relation for place, relation in enumerate(found)])
    relation = Relation(config, facts)
    blocks = [relation.block(_MANY, columns, torch.zeros(64, 64)) for columns in (_MANY, slice(64, 128))]
    whole = torch.cat(blocks, 1)
    assert whole.tolist() == expected
    part = relation.block(slice(5, 30), slice(70, 90), torch.zeros(25, 20))
    assert torch.equal(part, whole[5:30, 70:90])


def _alike(keys: list[list[int]], row: int, column: int) -> bool:
    return column < 64 and any(key[row] == key[column] for key in keys)


@pytest.mark.parametrize("seed", range(5))
def test_no_query_is_a_negative_that_has_an_answer_in_common(seed: int) -> None:
    facts = _random_facts(seed)
    query, document = facts.query_hash.tolist(), facts.document_hash.tolist()
    block = Relation(MaskConfig(same_document=False), facts).queries_block(_MANY, _MANY, torch.zeros(64, 64))
    pairs = list(zip(query, document, strict=True))
    for row, (own, answer) in enumerate(pairs):
        answers = {text for asked, text in pairs if asked == own}
        asking = {asked for asked, text in pairs if text == answer}
        for column, (asked, text) in enumerate(pairs):
            assert block[row, column] == (I if asked in asking or text in answers else N)
