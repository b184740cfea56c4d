"""Sizes that the work of a run follows from: of its models and of its corpus."""

from __future__ import annotations

from dataclasses import dataclass

# Names and punctuation of a document's record in a collection.
RECORD_CHARACTERS = 60


@dataclass(frozen=True)
class Shape:
    """A model by its sizes; the defaults are MiniLM-L6's, a transformer.

    hidden: width of its vectors; weights: those that every token passes, the token table is apart; vocabulary: rows of
    that table; static: it is the table alone.
    """

    hidden: int = 384
    weights: int = 6 * (4 * 384**2 + 2 * 384 * 1536)
    vocabulary: int = 30_522
    static: bool = False

    @property
    def kind(self) -> str:
        """As `train.encoder` names it."""
        return "static" if self.static else "backbone"

    @property
    def table(self) -> int:
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class TeacherShape:
    """A teacher by its sizes; reads_pairs: a cross-encoder, otherwise it embeds each text by itself."""

    shape: Shape
    reads_pairs: bool


@dataclass(frozen=True)
class Workload:
    """Sizes of the work. Characters are means per text.

    evaluation_bytes, evaluation_queries: of all collections' documents, and their judged queries.
    """

    rows: int
    sources: int
    input_bytes: int
    query_characters: float
    document_characters: float
    evaluation_bytes: int = 0
    evaluation_queries: int = 0

    def tokens(self, longest_query: int, longest_document: int) -> float:
        """Return the tokens of one pair after the cut, special tokens included, at about four characters a token."""
        query, document = self.query_characters / 4 + 2, self.document_characters / 4 + 2
        return min(query, longest_query) + min(document, longest_document)

    @property
    def characters(self) -> float:
        return self.query_characters + self.document_characters
