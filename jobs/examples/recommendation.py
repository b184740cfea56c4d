"""Recommendation as retrieval: the history of a user is the query, the item taken next is its document.

`python jobs/examples/recommendation.py runs/recommendation-data` makes an interaction log (who took what, in which
order), turns it into pairs of texts, and holds some users out as a test collection whose documents are all items. Then

    clusterbatch run jobs/examples/recommendation.yaml

trains and evaluates on it as on any other pairs. For a log of your own keep `history_pairs` and `held_out`: all they
want is the titles that each user took, in order.

What there is to learn: every genre has a companion, and who likes the one takes from both. Titles of the two share no
word but their moods, so that no model knows it that has not seen the log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GENRES = """
detective alibi suspect inspector clue motive
galaxy starship android orbit nebula colony
dragon wizard castle prophecy sword goblin
meadow harvest orchard village tractor barn
saxophone quartet trumpet melody swing vinyl
summit glacier climber avalanche ridge tent
senator election scandal ballot cabinet treaty
pastry vanilla caramel bakery almond recipe
submarine lagoon coral lighthouse captain reef
stallion saddle prairie outlaw canyon ranch
mansion phantom cellar whisper curse candle
goalkeeper stadium champion referee league trophy
""".strip().splitlines()
MOODS = "silent golden broken distant hidden burning gentle final secret frozen crimson lonely".split()  # noqa: SIM905
TITLES_PER_GENRE = 40
HISTORY = 4
HELD_OUT = 0.1


def catalogue(random: np.random.Generator) -> list[list[str]]:
    """Titles by genre, such as 'golden trumpet quartet'; no two alike."""
    titles = []
    for words in (line.split() for line in GENRES):
        made: dict[str, None] = {}
        while len(made) < TITLES_PER_GENRE:
            made[f"{random.choice(MOODS)} {' '.join(random.choice(words, 2, replace=False))}"] = None
        titles.append(list(made))
    return titles


def interaction_log(users: int, seed: int = 0) -> tuple[list[list[str]], list[str]]:
    """(the titles that each user took, in order; all titles there are).

    A user has a genre, its companion, and two moods that draw him eight times as much; some titles are popular.
    """
    random = np.random.default_rng(seed)
    titles = catalogue(random)
    # Genres in a ring of random order: two neighbours, the first at an even place, are companions.
    ring = random.permutation(len(titles))
    companion = np.empty(len(ring), np.int64)
    companion[ring[0::2]], companion[ring[1::2]] = ring[1::2], ring[0::2]
    popularity = np.arange(1.0, TITLES_PER_GENRE + 1) ** -0.5
    log = []
    for _ in range(users):
        genre, taken = int(random.integers(len(titles))), dict[str, None]()
        moods = random.choice(MOODS, 2, replace=False)
        for _ in range(int(random.integers(HISTORY + 1, 3 * HISTORY))):
            genre = int(companion[genre]) if random.random() < 0.5 else genre
            liked = np.array([title.split()[0] in moods for title in titles[genre]])
            weight = popularity * np.where(liked, 8.0, 1.0)
            taken[random.choice(titles[genre], p=weight / weight.sum())] = None
        log.append(list(taken))
    return log, [title for of_genre in titles for title in of_genre]


def history_pairs(taken: list[str]) -> Iterator[tuple[str, str]]:
    """(the titles before, the next one) for all but the first that a user took."""
    for place in range(1, len(taken)):
        yield "; ".join(taken[max(0, place - HISTORY) : place]), taken[place]


def held_out(folder: Path, log: list[list[str]], titles: list[str]) -> None:
    """A collection in BEIR layout: of each user the last title, to be found among all by the history before it."""
    number = {title: f"item{place:05d}" for place, title in enumerate(titles)}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    queries, judgements = [], ["query-id\tcorpus-id\tscore"]
    for user, taken in enumerate(log):
        *_, (history, title) = history_pairs(taken)
        queries.append({"_id": f"user{user:06d}", "text": history})
        judgements.append(f"user{user:06d}\t{number[title]}\t1")
    documents = [{"_id": name, "text": title} for title, name in number.items()]
    for file, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")


def main(folder: str, users: int = 6_000, seed: int = 0) -> None:
    place = Path(folder)
    log, titles = interaction_log(users, seed)
    log = [taken for taken in log if len(taken) > 1]
    tested = int(len(log) * HELD_OUT)
    held_out(place / "held-out-users", log[:tested], titles)
    pairs = [pair for taken in log[tested:] for pair in history_pairs(taken)]
    columns = {"history": [history for history, _ in pairs], "next_item": [title for _, title in pairs]}
    pq.write_table(pa.table(columns), place / "pairs.parquet")
    print(f"{len(pairs):,} pairs of {len(log) - tested:,} users, {tested:,} held out, {len(titles):,} items: {place}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
