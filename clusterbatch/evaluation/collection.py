"""Test collections in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv, on disk or in object storage.

Queries and judgements are small and read whole. Documents are read in fixed byte ranges, each range owning the lines
that start in it, so that a collection of any size is cut into the same units without being scanned first.

Texts (or images) that several encoders embed: those with the same tokenizer share the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clusterbatch.config import fingerprint
from clusterbatch.corpus.images import ImageError, is_data_uri, load_image
from clusterbatch.corpus.judgements import is_header, parse_judgement
from clusterbatch.encoder.model_files import shorter
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError
from clusterbatch.hashing import first_of_each
from clusterbatch.store import Folder
from clusterbatch.store.checksum import checksum

if TYPE_CHECKING:
    # Collections are checked before anything starts, for which importing torch would take too long.
    import torch

    from clusterbatch.encoder.images import Pixels
    from clusterbatch.encoder.model import Encoder


class Texts:
    """N queries or documents; tokens are made once for all encoders that would make the same."""

    def __init__(self, kind: Literal["query", "document"], texts: list[str], max_tokens: int) -> None:
        self._kind: Literal["query", "document"] = kind
        self.texts, self._max_tokens = texts, max_tokens
        self._tokens: dict[tuple[str, int | None, str], Tokens | Pixels] = {}

    def tokens(self, encoder: Encoder) -> Tokens | Pixels:
        """Return tokens cut to the evaluation's limit or the model's own, whichever is shorter, behind its own prompt.

        Raises UsageError if they are images and the model has no tower for them.
        """
        if encoder.images is None:
            self.check_texts(encoder.tokenizer.folder)
        prompt = encoder.prompts[self._kind]
        key = (encoder.preparation, shorter(self._max_tokens, encoder.max_tokens), prompt)
        if key not in self._tokens:
            self._tokens[key] = encoder.prepare(self.texts, self._max_tokens, prompt)
        return self._tokens[key]

    def check_texts(self, model: str) -> None:
        """Raise UsageError if they are images: `model` would read the letters that encode them."""
        if self.texts and all(map(is_data_uri, self.texts)):
            sides = {"query": "queries", "document": "documents"}[self._kind]
            raise UsageError(
                f"evaluate.models: {model} takes texts alone, but the {sides} of this collection are images"
            )

    def vectors(self, encoder: Encoder, batch_tokens: int) -> torch.Tensor:
        """Return (N, D) float32 unit vectors on the encoder's device; equal texts are encoded once."""
        import torch

        tokens = self.tokens(encoder)
        first, text_of_row = first_of_each(tokens.hashes)
        vectors = encoder.encode(tokens if len(first) == len(tokens) else tokens.take(first), batch_tokens)
        return torch.from_numpy(vectors[text_of_row]).to(encoder.device)


DOCUMENTS = "corpus.jsonl"
QUERIES = "queries.jsonl"
# The metrics library keeps a table as long as the highest grade for each query.
_HIGHEST_GRADE = 1000
_MOST_JUDGED = 1_000_000
_MOST_DECIMALS = 2
# A document as long as this has no line end where one must be: the file is not JSON Lines.
_LONGEST_LINE = 64 * 2**20
_STEP = 2**16
# Documents that are looked at before any work starts.
_HEAD_BYTES = 2**20
# Candidates of one block of queries that the driver holds, and items of a search of one collection.
_MERGED_AT_ONCE = 4_000_000
_MOST_ITEMS = 256
# Collections that a message names.
_NAMED = 5


@dataclass(frozen=True)
class Collection:
    """One folder in BEIR layout; `name` is what tables call it. Small and picklable."""

    name: str
    folder: Folder
    split: str = "test"

    @property
    def judgements_file(self) -> str:
        return f"qrels/{self.split}.tsv"

    def identity(self) -> str:
        """Fingerprint of the contents: judgements and queries by checksum, documents by size, head and tail.

        The documents may be many gigabytes; a change that keeps their size and both ends is not noticed.
        """
        size = self.documents_bytes()
        ends = self.folder.read(DOCUMENTS, 0, min(size, _STEP)) + self.folder.read(
            DOCUMENTS, max(0, size - _STEP), size
        )
        small = [checksum(self._read(name)) for name in (QUERIES, self.judgements_file)]
        return fingerprint(self.name, size, checksum(ends), *small)

    def documents_bytes(self) -> int:
        """Size of corpus.jsonl; raises DataError if there is none or it is empty."""
        try:
            size = self.folder.size(DOCUMENTS)
        except FileNotFoundError:
            raise DataError(f"{self.folder.uri}: no collection here ({DOCUMENTS} is missing)") from None
        if not size:
            raise DataError(f"{self.folder.uri}/{DOCUMENTS}: no documents in it")
        return size

    def read_judgements(self) -> dict[str, dict[str, int]]:
        """Return grade by document id by query id, in file order. Grades above 0 are relevant.

        Lines are `query-id corpus-id grade`, or TREC's `query-id iteration corpus-id grade`. If some grades are
        fractions, all are multiplied by the same power of ten: measures depend on their ratios only.

        Raises DataError that names the line of a damaged judgement, or of one beyond what can be measured.
        """
        place = f"{self.folder.uri}/{self.judgements_file}"
        judgements: dict[str, dict[str, float]] = {}
        lines = _decoded(self._read(self.judgements_file), place).split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (number == 1 and is_header(line)):
                continue
            try:
                query, document, grade = parse_judgement(line)
            except ValueError:
                raise DataError(
                    f"{place} line {number}: expected query-id, corpus-id and a grade (or TREC's four columns), "
                    "separated by tabs"
                ) from None
            if abs(grade) > _HIGHEST_GRADE:
                raise DataError(f"{place} line {number}: grade {grade:g} is beyond {_HIGHEST_GRADE:,}")
            of_query = judgements.setdefault(query, {})
            if of_query.setdefault(document, grade) != grade:
                raise DataError(f"{place} line {number}: query {query} and document {document} judged twice, unequally")
            if len(of_query) > _MOST_JUDGED:
                raise DataError(f"{place} line {number}: query {query} has more than {_MOST_JUDGED:,} judgements")
        if not judgements:
            raise DataError(f"{place}: no judgements in it")
        return _whole_grades(judgements, place)

    def read_queries(self, judgements: dict[str, dict[str, int]]) -> dict[str, str]:
        """Text by id of the judged queries, in the order of the judgements.

        Raises DataError if a judged query has no text or a query id occurs twice.
        """
        place = f"{self.folder.uri}/{QUERIES}"
        texts: dict[str, str] = {}
        position = 0
        for line in self._read(QUERIES).splitlines(keepends=True):
            if line.strip():
                item = _parse(line, place, position)
                if item["_id"] in texts:
                    raise DataError(f"{place}: query id {item['_id']} occurs twice")
                texts[item["_id"]] = self._content(item, place, position)
            position += len(line)
        missing = [query for query in judgements if query not in texts]
        if missing:
            raise DataError(f"{place}: {len(missing)} judged queries have no text here, the first is {missing[0]}")
        return {query: texts[query] for query in judgements}

    def check(self) -> None:
        """Raise UsageError if a file of the collection is missing, and what `check_ids` raises."""
        for name in (DOCUMENTS, QUERIES):
            if not self.folder.exists(name):
                inside = [child for child in self.folder.list() if self.folder.exists(f"{child}/{DOCUMENTS}")]
                named = ",".join(f"{self.folder.uri}/{name}" for name in sorted(inside)[:_NAMED])
                hint = f"; it holds some: give evaluate.path=[{named}]" if inside else ""
                raise UsageError(
                    f"evaluate.path: {self.folder.uri} is not a collection in BEIR layout (no {name}){hint}"
                )
        if not self.folder.exists(self.judgements_file):
            raise UsageError(
                f"evaluate.split: {self.folder.uri} has no judgements called {self.split} ({self.judgements_file})"
            )
        self.check_ids()

    def check_ids(self) -> None:
        """Raise DataError for a query or one of the first documents that has no id, or one with white space in it.

        Reads the queries and the first megabyte of documents; raises DataError as well if that holds none.
        """
        self.read_queries(self.read_judgements())
        data, position = self._read_lines(0, min(_HEAD_BYTES, self.documents_bytes()))
        if not data.strip():
            raise DataError(f"{self.folder.uri}/{DOCUMENTS}: no documents in it")
        for line in data.split(b"\n"):
            if line.strip():
                _parse(line, f"{self.folder.uri}/{DOCUMENTS}", position)
            position += len(line) + 1

    def document_ranges(self, unit_bytes: int) -> list[tuple[int, int]]:
        """Byte ranges [start, end) that cover corpus.jsonl; they follow from its size alone."""
        size = self.documents_bytes()
        return [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]

    def read_documents(self, start: int, end: int) -> tuple[list[str], list[str]]:
        """Ids and texts (title and text joined by a space) of the documents whose lines start in [start, end).

        Images are data URIs.
        Raises DataError, which names the bytes, if a line is not a document or an id occurs twice.
        """
        place = f"{self.folder.uri}/{DOCUMENTS}"
        data, position = self._read_lines(start, end)
        ids, texts = [], []
        # Split at line feeds alone: a JSON string may hold other characters that str.splitlines would split at.
        for line in data.split(b"\n"):
            if line.strip():
                item = _parse(line, place, position)
                ids.append(item["_id"])
                title = "" if "image" in item else _whole_characters(str(item.get("title") or ""))
                texts.append(f"{title} {self._content(item, place, position)}".strip())
            position += len(line) + 1
        if len(set(ids)) < len(ids):
            raise DataError(f"{place}: a document id occurs twice between bytes {start} and {end}")
        return ids, texts

    def _content(self, item: dict[str, Any], place: str, position: int) -> str:
        """The text; or the image as a data URI, fetched and checked."""
        if isinstance(item.get("image"), str):
            try:
                return load_image(item["image"], self.folder)
            except ImageError as error:
                raise DataError(f"{place} byte {position}: image of {item['_id']}: {error}") from None
        return _whole_characters(item["text"])

    def _read_lines(self, start: int, end: int) -> tuple[bytes, int]:
        """Bytes of the whole lines that start in [start, end), and where they begin."""
        size = self.documents_bytes()
        # The byte before tells whether a line starts exactly at `start`.
        first = max(0, start - 1)
        data = self.folder.read(DOCUMENTS, first, end)
        if start > 0:
            feed = data.find(b"\n")
            if feed < 0:
                return b"", end
            data, first = data[feed + 1 :], first + feed + 1
        most, step = len(data) + _LONGEST_LINE, _STEP
        while data and not data.endswith(b"\n") and end < size:
            more = self.folder.read(DOCUMENTS, end, min(end + step, size))
            feed = more.find(b"\n")
            data += more if feed < 0 else more[: feed + 1]
            end += len(more) if feed < 0 else feed + 1
            # In equal steps, a long line would be copied as often as it has some.
            step *= 2
            if len(data) > most:
                raise DataError(f"{self.folder.uri}/{DOCUMENTS} byte {first}: no line end, not JSON Lines")
        return data, first

    def _read(self, name: str) -> bytes:
        try:
            return self.folder.read(name)
        except FileNotFoundError:
            raise DataError(f"{self.folder.uri}: no collection here ({name} is missing)") from None


def search_items(ranges: int, top_k: int) -> tuple[int, int]:
    """Return how many document ranges one item of a search takes, and how many queries are merged at once.

    An item writes one object per model, and the driver reads every block of queries from all items.
    """
    ranges_of_item = max(1, -(-ranges // _MOST_ITEMS))
    items = max(1, -(-ranges // ranges_of_item))
    return ranges_of_item, max(64, min(4096, _MERGED_AT_ONCE // (top_k * items)))


def open_collections(folders: list[Folder], split: str = "test", taken: Sequence[str] = ()) -> list[Collection]:
    """Return collections named by their folders; the parent's name is put in front of a name that two folders share.

    taken: names of other collections that are searched with them.
    """
    names = [folder.uri.rsplit("/", 1)[-1] for folder in folders]
    collections = []
    for folder, name in zip(folders, names, strict=True):
        if [*names, *taken].count(name) > 1:
            name = "/".join(folder.uri.rsplit("/", 2)[-2:])
        collections.append(Collection(name, folder, split))
    if len({collection.name for collection in collections}) < len(collections):
        raise DataError("evaluate.path: two collections have the same name and parent folder")
    return collections


def _whole_grades(judgements: dict[str, dict[str, float]], place: str) -> dict[str, dict[str, int]]:
    """Return the grades as whole numbers, multiplied by the least power of ten that makes them whole."""
    grades = {grade for of_query in judgements.values() for grade in of_query.values()}
    for decimals in range(_MOST_DECIMALS + 1):
        factor = 10**decimals
        if all(abs(grade * factor - round(grade * factor)) < 1e-6 for grade in grades):
            return {
                query: {document: round(grade * factor) for document, grade in of_query.items()}
                for query, of_query in judgements.items()
            }
    raise DataError(f"{place}: grades with more than {_MOST_DECIMALS} decimals")


def _parse(line: bytes, place: str, position: int) -> dict[str, Any]:
    """One line of corpus.jsonl or queries.jsonl, with `_id` and `text` (or `image`) as strings."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place} byte {position}: not valid JSON") from None
    if isinstance(item, dict) and item.get("image") is None:
        # Tables of texts and images are exported with both columns.
        item.pop("image", None)
    if not isinstance(item, dict) or "_id" not in item or not isinstance(item.get("image", item.get("text")), str):
        raise DataError(f"{place} byte {position}: expected an object with _id and text (or image)")
    # Numbers as ids are common in converted collections; judgements spell them as text.
    item["_id"] = str(item["_id"])
    if not item["_id"] or any(character.isspace() for character in item["_id"]):
        raise DataError(f"{place} byte {position}: an _id must not be empty or hold white space")
    if _whole_characters(item["_id"]) != item["_id"]:
        raise DataError(f"{place} byte {position}: an _id must not hold half of a surrogate pair")
    return item


def _whole_characters(text: str) -> str:
    """Return a text with U+FFFD in place of halves of surrogate pairs, which JSON can hold and tokenizers refuse."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} byte {error.start}: not UTF-8") from None
