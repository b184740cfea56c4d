"""Configuration: one typed section per stage, read from YAML and dotted overrides, with fingerprints."""

from clusterbatch.config.base import Section, fingerprint, operational
from clusterbatch.config.batches import BatchesConfig, PhaseConfig
from clusterbatch.config.compare import CompareConfig
from clusterbatch.config.environment import RayConfig, ReuseConfig, StorageConfig
from clusterbatch.config.experiments import PredictConfig, RefreshConfig, ReportConfig, TuneConfig
from clusterbatch.config.load import RunConfig, dotted, load_config, load_words, shown_configuration, with_changes
from clusterbatch.config.stages import (
    DOCSTRINGS,
    ClusterConfig,
    ColumnsConfig,
    CorpusConfig,
    DuplicatesConfig,
    EmbedConfig,
    MineConfig,
    ScoreConfig,
)
from clusterbatch.config.training import (
    EvaluateConfig,
    FilterConfig,
    LoraConfig,
    MaskConfig,
    PromptsConfig,
    TrainConfig,
)

__all__ = [
    "DOCSTRINGS",
    "BatchesConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "CompareConfig",
    "CorpusConfig",
    "DuplicatesConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FilterConfig",
    "LoraConfig",
    "MaskConfig",
    "MineConfig",
    "PhaseConfig",
    "PredictConfig",
    "PromptsConfig",
    "RayConfig",
    "RefreshConfig",
    "ReportConfig",
    "ReuseConfig",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "StorageConfig",
    "TrainConfig",
    "TuneConfig",
    "dotted",
    "fingerprint",
    "load_config",
    "load_words",
    "operational",
    "shown_configuration",
    "with_changes",
]
