"""One optimizer step: it takes a slice of a global batch, moves the parameters and returns figures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.config import TrainConfig
from clusterbatch.encoder.inputs import Inputs, concatenate, token_ids
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import DataError
from clusterbatch.training.bert_layers import BertLayers
from clusterbatch.training.collectives import FlatGradients, World, gather_batch
from clusterbatch.training.grad_cache import CachedEmbedding, RandomKey
from clusterbatch.training.loss import ContrastiveLoss
from clusterbatch.training.optimizer import Optimizer
from clusterbatch.training.prepare_model import activation_bytes, autocast, micro_batch_tokens, prepare, token_table
from clusterbatch.training.starting_model import default_learning_rate

# The name of the temperature's logarithm among the parameters, if it is learned.
LOG_SCALE = "loss.log_scale"


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over the whole global batch; the same on all ranks except `seconds`."""

    loss: float
    accuracy: float
    hardness: float
    mask_rate: float
    gradient_norm: float
    learning_rate: float
    temperature: float
    pairs: int
    tokens: int
    padded_tokens: int
    kept_share: float
    seconds: float
    # How many ranks were asked to stop.
    stop_requests: int


class TrainingStep:
    """State that changes from step to step: model, temperature, gradients, optimizer.

    trainable: name -> parameter, in a fixed order; names are those of the checkpoints.
    """

    def __init__(self, encoder: Encoder, config: TrainConfig, steps: int, world: World) -> None:
        self.encoder, self.config, self.world = encoder, config, world
        prepare(encoder, config)
        self.loss = ContrastiveLoss(config).to(encoder.device)
        named = [(f"encoder.{name}", parameter) for name, parameter in encoder.named_parameters()]
        named += [(f"loss.{name}", parameter) for name, parameter in self.loss.named_parameters()]
        self.trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
        table = token_table(encoder).weight
        tables = [name for name, parameter in self.trainable.items() if parameter is table]
        self.gradients = FlatGradients(list(self.trainable.values()), [self.trainable[name] for name in tables], world)
        weights = sum(parameter.numel() for parameter in encoder.parameters())
        self.optimizer = Optimizer(
            self.trainable, config, steps, config.learning_rate or default_learning_rate(config, weights), tables
        )
        self._autocast = autocast(config, encoder)
        self._activation_bytes = activation_bytes(config, encoder.device)
        self._micro_batch_tokens = micro_batch_tokens(config, encoder)

    def run(self, batch: SliceBatch, stop_requested: bool = False) -> StepResult:
        """Train on the global batch of which `batch` is this rank's slice.

        Raises DataError, on all ranks, if the loss or a gradient is no longer a finite number.
        """
        start = time.perf_counter()
        kinds = [batch.query_tokens, batch.document_tokens]
        if batch.negative_tokens is not None:
            kinds.append(batch.negative_tokens)
        tokens = concatenate(kinds)
        rows = self.gradients.begin(np.append(token_ids(tokens), self.encoder.tokenizer.padding))
        self.optimizer.catch_up(batch.step, rows)
        with self._fixed_weights():
            embedding = CachedEmbedding(
                self._encode,
                tokens,
                RandomKey(self.config.seed, batch.step, self.world.rank),
                micro_batch_tokens=self._micro_batch_tokens,
                activation_bytes=self._activation_bytes,
                padded=not self.encoder.unpadded,
                encode_keeping_less=self._encode_keeping_less if self._layers else None,
            )
            vectors = embedding.vectors.split([len(kind) for kind in kinds])
            negatives = vectors[2] if batch.negative_tokens is not None else None
            gathered = gather_batch(batch, self.world, self.encoder.device, self.config)
            loss, statistics = self.loss(vectors[0], vectors[1], negatives, gathered)
            loss.backward()
            embedding.backward()
        self.gradients.reduce()
        norm = self.gradients.clip(self.config.clip_norm)
        rate = self.optimizer.step(batch.step)
        self.loss.limit_temperature_()
        own = torch.tensor(
            [tokens.lengths.sum(), self._computed_tokens(embedding, tokens), embedding.kept_share, stop_requested],
            dtype=torch.float64,
            device=loss.device,
        )
        # One small sum for all figures; it also lets every rank know at once that one of them has to stop.
        sums = self.world.sum_(torch.cat([loss.detach().double()[None], statistics.stack(), own])).tolist()
        total, rows, correct, hardest, ignored, considered, token_count, padded, kept, stops = sums
        gradient_norm = float(norm)
        if not (math.isfinite(total) and math.isfinite(gradient_norm)):
            # The same on all ranks. No later step would be finite, and its checkpoints would replace the good ones.
            raise DataError(
                f"train: loss {total}, gradient norm {gradient_norm} in step {batch.step}; "
                "a lower train.learning_rate, a longer train.warmup or a higher train.temperature may keep them finite"
            )
        return StepResult(
            loss=total,
            accuracy=correct / rows,
            hardness=hardest / rows,
            mask_rate=ignored / max(1.0, considered),
            gradient_norm=gradient_norm,
            learning_rate=rate,
            temperature=self.loss.temperature,
            pairs=int(rows),
            tokens=int(token_count),
            padded_tokens=int(padded),
            kept_share=kept / self.world.size,
            seconds=time.perf_counter() - start,
            stop_requests=int(stops),
        )

    @contextmanager
    def current_weights(self, steps_done: int) -> Iterator[None]:
        """Let the encoder have the weights after `steps_done` steps of the run, those of rows not yet updated too."""
        current = self.optimizer.current(steps_done)
        before = {name: self.trainable[name].data for name in current}
        for name, values in current.items():
            self.trainable[name].data = values
        try:
            yield
        finally:
            for name, values in before.items():
                self.trainable[name].data = values

    def saved_state(self, steps_done: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (parameters, optimizer state) to be saved after `steps_done` steps of the run; see `load`."""
        parameters, _ = self.state()
        return {**parameters, **self.optimizer.current(steps_done)}, self.optimizer.saved_state()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (parameters, optimizer moments), the live tensors by name."""
        return {name: parameter.detach() for name, parameter in self.trainable.items()}, self.optimizer.state()

    def blank(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (parameters, moments of zero): what `state` returns after a step, with the values before any."""
        parameters = {name: parameter.detach() for name, parameter in self.trainable.items()}
        return parameters, self.optimizer.blank_state()

    def load(self, parameters: dict[str, Tensor], moments: dict[str, Tensor], steps_done: int) -> None:
        """Copy what `state` or `saved_state` returned, of the same model, into the live tensors.

        It has seen `steps_done` steps, those of earlier generations included.
        """
        assert parameters.keys() == self.trainable.keys(), "a checkpoint of another model"
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(parameters[name])
        self.optimizer.load(moments, steps_done)

    def _computed_tokens(self, embedding: CachedEmbedding, tokens: Inputs) -> int:
        """Count the tokens that the encoder computes on, padding included; a static one computes on no padding."""
        return int(tokens.lengths.sum()) if self.encoder.kind == "static" else embedding.padded_tokens

    def _encode(self, tokens: Inputs) -> Tensor:
        with self._autocast():
            vectors: Tensor = self.encoder(tokens)
        return vectors

    def _encode_keeping_less(self, tokens: Inputs) -> Tensor:
        layers = self._layers
        assert layers is not None
        before, layers.keep = layers.keep, "sums"
        vectors = self._encode(tokens)
        layers.keep = before
        return vectors

    @property
    def _layers(self) -> BertLayers | None:
        return self.encoder.packed if isinstance(self.encoder.packed, BertLayers) else None

    def _fixed_weights(self) -> AbstractContextManager[None]:
        """Return the context of the passes between two updates of the weights."""
        return self._layers.fixed_weights() if self._layers else nullcontext()
