"""Same-cluster batches in a plain PyTorch loop: `python jobs/examples/torch_batches.py PAIRS.parquet MODEL`.

PAIRS has the columns query, document and cluster (any labels; clusterbatch.label_rows takes them from a workspace).
"""

import sys

import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from clusterbatch import ClusterBatchSampler
from clusterbatch.config import BatchesConfig


def main(pairs: str, model: str, size: int = 64, epochs: int = 1) -> list[float]:
    rows = pq.read_table(pairs, columns=["query", "document", "cluster"]).to_pylist()
    sampler = ClusterBatchSampler([row["cluster"] for row in rows], BatchesConfig(size=size))
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=list)
    encoder, losses = SentenceTransformer(model), []
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            texts = ([row["query"] for row in batch], [row["document"] for row in batch])
            vectors = (encoder(encoder.preprocess(side))["sentence_embedding"] for side in texts)
            query, document = (torch.nn.functional.normalize(side) for side in vectors)
            loss = torch.nn.functional.cross_entropy(query @ document.T / 0.05, torch.arange(len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
