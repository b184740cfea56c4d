"""Generate images of coloured shapes with captions, and a small CLIP with random weights to train on them.

`python jobs/examples/images.py runs/images-data` writes pairs.parquet (caption, image as encoded bytes), a test
collection whose images differ from every training image in colour, shape, size, place or ground, and a model folder
like that of any CLIP. Then

    clusterbatch run jobs/examples/images.yaml

embeds, clusters, trains and evaluates. The same configuration works with your own pairs and model: an image may be
bytes or the address of a file (local or s3://).
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (250, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
SIZES = {"small": 5, "large": 9}
PLACES = {"left": (10, 16), "right": (22, 16), "top": (16, 10), "bottom": (16, 22)}
GROUNDS = {"dark": 40, "grey": 128, "bright": 230}
SIDE = 32
Look = tuple[str, str, str, str, str]


def looks() -> list[Look]:
    """Return all (colour, shape, size, place, ground)."""
    return list(itertools.product(COLOURS, SHAPES, SIZES, PLACES, GROUNDS))


def caption(look: Look) -> str:
    colour, shape, size, place, ground = look
    return f"a {size} {colour} {shape} at the {place} on {ground} ground"


def draw(look: Look, random: np.random.Generator) -> bytes:
    """Return a PNG; place and shade vary a little."""
    colour, shape, size, place, ground = look
    noise = random.integers(-12, 13, (SIDE, SIDE, 3)) + GROUNDS[ground]
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    x, y = (centre + int(random.integers(-1, 2)) for centre in PLACES[place])
    r = SIZES[size]
    pencil, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        pencil.rectangle((x - r, y - r, x + r, y + r), fill)
    elif shape == "triangle":
        pencil.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
    elif shape == "diamond":
        pencil.polygon(((x, y - r), (x - r, y), (x, y + r), (x + r, y)), fill)
    elif shape == "cross":
        pencil.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
        pencil.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    else:
        pencil.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_collection(folder: Path, held_out: list[Look], random: np.random.Generator) -> None:
    """Write a collection in BEIR layout: captions are queries, images are documents."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for number, look in enumerate(held_out):
        encoded = base64.b64encode(draw(look, random)).decode()
        documents.append({"_id": f"image{number:04d}", "image": f"data:image/png;base64,{encoded}"})
        queries.append({"_id": f"caption{number:04d}", "text": caption(look)})
        judgements.append(f"caption{number:04d}\timage{number:04d}\t1")
    for file, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")


def write_clip(folder: Path, captions: list[str], seed: int) -> None:
    """Write a CLIP folder in the layout of transformers: towers of two layers with random weights, and a tokenizer of
    the captions' words."""
    import tokenizers
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(captions, tokenizers.trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate([*sorted(model["vocab"]), *special])}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **layers,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "bos_token_id": vocabulary[special[0]],
        "eos_token_id": vocabulary[special[1]],
        "pad_token_id": vocabulary[special[1]],
    }
    vision = {**layers, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(folder)


def main(folder: str, pairs: int = 6_000, held_out: int = 160, seed: int = 0) -> None:
    place, random = Path(folder), np.random.default_rng(seed)
    place.mkdir(parents=True, exist_ok=True)
    every = looks()
    order = random.permutation(len(every)).tolist()
    tested, trained = [every[n] for n in order[:held_out]], [every[n] for n in order[held_out:]]
    chosen = [trained[n] for n in random.integers(len(trained), size=pairs).tolist()]
    # The struct that Hugging Face's data sets use for images.
    images = pa.array([{"bytes": draw(look, random), "path": None} for look in chosen], IMAGE)
    table = pa.table({"caption": [caption(look) for look in chosen], "image": images})
    pq.write_table(table, place / "pairs.parquet")
    write_collection(place / "held-out-looks", tested, random)
    write_clip(place / "clip", [caption(look) for look in every], seed)
    print(f"{pairs:,} pairs of {len(trained):,} looks, {held_out:,} looks held out, and a small CLIP: {place}")


IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

if __name__ == "__main__":
    main(*sys.argv[1:2])
