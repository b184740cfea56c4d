"""What a run is: one typed section per stage, read from YAML and dotted overrides, with fingerprints."""

from clusterbatch.config.base import Section, fingerprint, operational
from clusterbatch.config.batches import BatchesConfig, PhaseConfig
from clusterbatch.config.cluster import ClusterConfig
from clusterbatch.config.compare import CompareConfig
from clusterbatch.config.corpus import DOCSTRINGS, ColumnsConfig, CorpusConfig
from clusterbatch.config.embed import EmbedConfig
from clusterbatch.config.evaluate import EvaluateConfig
from clusterbatch.config.load import RunConfig, load_config, with_changes
from clusterbatch.config.mine import MineConfig
from clusterbatch.config.predict import PredictConfig
from clusterbatch.config.refresh import RefreshConfig
from clusterbatch.config.report import ReportConfig
from clusterbatch.config.reuse import ReuseConfig
from clusterbatch.config.runtime import RayConfig, StorageConfig
from clusterbatch.config.train import LoraConfig, MaskConfig, PromptsConfig, TrainConfig
from clusterbatch.config.tune import TuneConfig

__all__ = [
    "DOCSTRINGS",
    "BatchesConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "CompareConfig",
    "CorpusConfig",
    "EmbedConfig",
    "EvaluateConfig",
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
    "Section",
    "StorageConfig",
    "TrainConfig",
    "TuneConfig",
    "fingerprint",
    "load_config",
    "operational",
    "with_changes",
]
