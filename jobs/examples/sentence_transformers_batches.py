"""Same-cluster batches in Sentence Transformers' trainer:
`python jobs/examples/sentence_transformers_batches.py PAIRS.parquet MODEL OUTPUT`.

PAIRS has the columns query, document and cluster (any labels; clusterbatch.label_rows takes them from a workspace).
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

from clusterbatch import SentenceTransformersSampler


def main(pairs: str, model: str, output: str, **arguments: object) -> SentenceTransformerTrainer:
    dataset = Dataset.from_parquet(pairs)
    sampler = SentenceTransformersSampler(dataset["cluster"])
    encoder = SentenceTransformer(model)
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(output, batch_sampler=sampler, report_to="none", **arguments),
        train_dataset=dataset.select_columns(["query", "document"]),
        loss=MultipleNegativesRankingLoss(encoder),
    )
    trainer.train()
    encoder.save_pretrained(output)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
