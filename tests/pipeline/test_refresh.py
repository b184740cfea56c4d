from pathlib import Path

from clusterbatch.config import load_config
from clusterbatch.pipeline import refresh
from clusterbatch.store.workspace import Workspace


def test_a_generation_of_the_largest_seed_has_a_seed_of_its_own(tmp_path: Path) -> None:
    words = [f"workspace={tmp_path}", "refresh.surrogate=any", f"train.seed={2**63 - 1}", f"batches.seed={2**63 - 1}"]
    config = load_config(None, words)
    made = [refresh._config_of(config, Workspace(config), 0, generation) for generation in (1, 2)]
    assert len({config.train.seed, *(each.train.seed for each in made)}) == 3
    assert len({config.batches.seed, *(each.batches.seed for each in made)}) == 3
