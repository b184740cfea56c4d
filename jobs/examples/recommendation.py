"""Recommendation as retrieval: the query is a customer's history, the document the next purchase.

`python jobs/examples/recommendation.py runs/recommendation-data` generates the log of a shop and writes pairs.parquet
(history, next_item), a test collection (the last purchases of customers who are not in the pairs, to be found among all
items) and a small transformer with random weights. An optional second argument is the number of customers. Then

    clusterbatch run jobs/examples/recommendation.yaml

trains and evaluates as on any other pairs. For your own log keep `history_pairs` and `write_collection`: they need
only the items that each customer bought, in order.

Only the log teaches the task. Items with similar words replace each other, such as two tents; the next purchase is an
item that goes with the last one, such as a sleeping bag, from a brand that the same customers like.

Ceiling: the log is drawn from `chances`, the probability of every item as a customer's next purchase. The expected
hits among ten items cannot exceed the sum of the ten largest (NDCG: each divided by log2(rank + 1)). The script prints
their average over the test customers, and the score of counting: the ten items that most often followed the history's
last one in the log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Items of one pursuit, in the order in which they are bought.
PURSUITS = [
    [kind.strip() for kind in line.split(",")]
    for line in """
tent, sleeping bag, camp stove, lantern, cool box, hammock, water filter, firewood axe
flour mill, mixing bowl, dough scraper, proving basket, baking stone, bread knife, cooling rack, bread bin
easel, canvas roll, oil paints, palette, brush set, varnish, picture frame, gallery spotlight
road bike, helmet, bike lock, floor pump, cycling computer, pannier, chain cleaner, repair stand
aquarium, gravel, filter pump, heater rod, plant tongs, fish food, algae scraper, test strips
cot, changing table, baby monitor, bottle warmer, high chair, stair gate, night light, pushchair
turntable, phono amplifier, speakers, speaker cable, record brush, record sleeves, stylus scale, listening armchair
spade, seed tray, compost bin, watering can, pruning shears, trellis, wheelbarrow, garden hose
sewing machine, thread box, fabric scissors, pincushion, pattern paper, tailor chalk, dress form, steam iron
coffee grinder, espresso machine, tamper, milk jug, knock box, descaler, cup warmer, serving tray
telescope, eyepiece, star chart, red torch, dew shield, camera adapter, moon filter, observing stool
ski set, ski boots, goggles, wax iron, ski bag, boot dryer, back protector, avalanche beacon
dog collar, lead, dog bed, feeding bowl, chew toy, fur comb, travel crate, dog coat
sketchbook, fountain pen, ink bottle, blotting paper, letter scale, sealing wax, desk lamp, bookends
rowing machine, floor mat, dumbbells, pull-up bar, foam roller, heart monitor, protein shaker, massage gun
drum kit, drumsticks, practice pad, metronome, ear defenders, drum rug, cymbal bag, stick holder
""".strip().splitlines()
]
KINDS = [kind for pursuit in PURSUITS for kind in pursuit]
STEPS = len(PURSUITS[0])
# A customer likes the brands of one taste, the first most. The names do not reveal it.
TASTES = ["Norvik Alder Quillon", "Brask Tamsin Ovelle", "Feldt Marrow Zephra", "Lunden Kestor Yarrick"]
BRANDS = [brand for taste in TASTES for brand in taste.split()]
QUALITIES = "light sturdy compact classic durable foldable handmade quiet slim washable".split()  # noqa: SIM905
NEXT, AFTER_NEXT = 0.6, 0.2
LOYALTY, LIKED = 0.85, (0.5, 0.3, 0.2)
HISTORY = 3
HELD_OUT = 0.25


def catalogue(random: np.random.Generator) -> list[str]:
    """Return texts such as 'washable Norvik sleeping bag'; every brand makes every kind, KINDS x BRANDS in order."""
    return [f"{random.choice(QUALITIES)} {brand} {kind}" for kind in KINDS for brand in BRANDS]


def chances(bought: list[int], taste: int) -> np.ndarray:
    """Return float64 (items,): the probability of being bought next.

    Mostly that is the next item of the pursuit or the one after; otherwise, or if there is none, the first item of a
    pursuit that the customer has not taken up yet.
    """
    kinds = np.zeros(len(KINDS))
    if bought:
        last = bought[-1] // len(BRANDS)
        left = STEPS - 1 - last % STEPS
        kinds[last + 1 : last + 1 + min(left, 2)] = (NEXT, AFTER_NEXT)[:left]
    begun = {item // len(BRANDS) // STEPS for item in bought}
    new = [pursuit * STEPS for pursuit in range(len(PURSUITS)) if pursuit not in begun]
    kinds[new] = (1 - kinds.sum()) / len(new)
    brands = np.full(len(BRANDS), (1 - LOYALTY) / len(BRANDS))
    brands[len(LIKED) * taste : len(LIKED) * (taste + 1)] += LOYALTY * np.array(LIKED)
    return np.outer(kinds, brands).ravel()


def interaction_log(customers: int, random: np.random.Generator) -> tuple[list[list[int]], np.ndarray]:
    """Return (the items that each customer bought, in order; the taste of each customer)."""
    tastes = random.integers(len(TASTES), size=customers)
    log: list[list[int]] = []
    for taste in tastes.tolist():
        bought: list[int] = []
        for _ in range(int(random.integers(4, 10))):
            bought.append(int(random.choice(len(KINDS) * len(BRANDS), p=chances(bought, taste))))
        log.append(bought)
    return log, tastes


def history_pairs(bought: list[int], texts: list[str]) -> list[tuple[str, str]]:
    """Return (the last items before, the next one) for every purchase except the first."""
    return [
        ("; ".join(texts[item] for item in bought[max(0, place - HISTORY) : place]), texts[bought[place]])
        for place in range(1, len(bought))
    ]


def write_collection(folder: Path, log: list[list[int]], texts: list[str]) -> None:
    """Write a collection in BEIR layout: the history is the query, the last purchase the answer among all items."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    queries, judgements = [], ["query-id\tcorpus-id\tscore"]
    for customer, bought in enumerate(log):
        history, _ = history_pairs(bought, texts)[-1]
        queries.append({"_id": f"customer{customer:05d}", "text": history})
        judgements.append(f"customer{customer:05d}\titem{bought[-1]:05d}\t1")
    documents = [{"_id": f"item{item:05d}", "text": text} for item, text in enumerate(texts)]
    for file, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")


def quality(scores: np.ndarray, chance: np.ndarray) -> str:
    """Return the expected measures of the ten best items by `scores` under `chance`; both (customers, items)."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    found = np.take_along_axis(chance, best, axis=1)
    return f"HitRate@10 {found.sum(1).mean():.4f}, NDCG@10 {(found / np.log2(np.arange(2, 12))).sum(1).mean():.4f}"


def counts(log: list[list[int]], items: int) -> np.ndarray:
    """Return float64 (items, items): how often the second item followed the first."""
    found = np.zeros((items, items))
    for bought in log:
        np.add.at(found, (bought[:-1], bought[1:]), 1)
    return found


def write_transformer(folder: Path, texts: list[str], seed: int) -> None:
    """Write a BERT folder in the layout of transformers: two layers with random weights, the words of the catalogue."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in texts for word in text.lower().replace("-", " ").split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *";-", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)
    BertModel(config).save_pretrained(folder)


def main(folder: str, customers: int = 6_000, seed: int = 0) -> None:
    place, random = Path(folder), np.random.default_rng(seed)
    place.mkdir(parents=True, exist_ok=True)
    texts = catalogue(random)
    log, tastes = interaction_log(customers, random)
    tested = int(customers * HELD_OUT)
    write_collection(place / "held-out-customers", log[:tested], texts)
    write_transformer(place / "transformer", texts, seed)
    pairs = [pair for bought in log[tested:] for pair in history_pairs(bought, texts)]
    columns = {"history": [history for history, _ in pairs], "next_item": [text for _, text in pairs]}
    pq.write_table(pa.table(columns), place / "pairs.parquet")
    print(
        f"{len(pairs):,} pairs of {customers - tested:,} customers, {tested:,} held out, {len(texts):,} items: {place}"
    )
    tests = list(zip(log[:tested], tastes[:tested].tolist(), strict=True))
    chance = np.stack([chances(bought[:-1], taste) for bought, taste in tests])
    followers = counts(log[tested:], len(texts))
    print(f"ceiling:  {quality(chance, chance)}")
    print(f"counting: {quality(followers[[bought[-2] for bought, _ in tests]], chance)}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
