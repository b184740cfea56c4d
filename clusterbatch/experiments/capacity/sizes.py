"""Sizes that the work of a run follows from: of its models and of its corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Names and punctuation of a document's record in a collection.
RECORD_CHARACTERS = 60


@dataclass(frozen=True)
class Shape:
    """A model by its sizes; the defaults are MiniLM-L6's, a transformer.

    hidden: width of its vectors; weights: those that every token of a text passes, the token table is apart;
    vocabulary: rows of that table; static: it is the table alone. held: weights that it has in memory beside the table,
    those of experts that a token does not choose and of an image's tower among them, None: `weights`; vision, patches:
    weights that every patch of an image passes, and patches of an image.
    """

    hidden: int = 384
    weights: int = 6 * (4 * 384**2 + 2 * 384 * 1536)
    vocabulary: int = 30_522
    static: bool = False
    held: int | None = None
    vision: int = 0
    patches: int = 0

    @property
    def kind(self) -> str:
        """As `train.encoder` names it."""
        return "static" if self.static else "backbone"

    @property
    def table(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.table + (self.weights if self.held is None else self.held)

    def passed(self, tokens: float, images: int) -> float:
        """Return the sum over `tokens` of text and over images of the weights that each token and patch passes."""
        return self.weights * tokens + images * self.patches * self.vision


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

    def tokens(self, longest_query: int, longest_document: int, images: Sequence[str] = ()) -> float:
        """Return the tokens of one pair after the cut, special tokens included, at about four characters a token.

        images: sides ("query", "document") that are images and have none.
        """
        query, document = self.query_characters / 4 + 2, self.document_characters / 4 + 2
        sides = {"query": min(query, longest_query), "document": min(document, longest_document)}
        return sum(tokens for side, tokens in sides.items() if side not in images)

    def image_bytes(self, images: Sequence[str]) -> float:
        """Return the bytes of a pair's images, which are kept in four characters for every three."""
        sides = {"query": self.query_characters, "document": self.document_characters}
        return 0.75 * sum(characters for side, characters in sides.items() if side in images)

    @property
    def characters(self) -> float:
        return self.query_characters + self.document_characters
