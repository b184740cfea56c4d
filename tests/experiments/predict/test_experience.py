"""What earlier comparisons foretell: of sources like theirs something, of themselves nothing, from noise nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import DataError
from clusterbatch.experiments.predict.experience import FEATURES, foretell, left_out, read_table, source_gains
from tests.experiments.compare.made_up import METRIC, made_up_comparison

RANDOM = np.random.default_rng(1)


def _config(folder: Path) -> RunConfig:
    return load_config(None, [f"workspace={folder}/ws", f"predict.experience={folder}/table.json"])


def _source(row: np.ndarray) -> dict[str, Any]:
    """What a prediction says of a source whose FEATURES are `row`."""
    gain, diversity, hardness, false, duplicates, log_rows = row.tolist()
    own = {"hardness": hardness, "false_negatives": false}
    return {"gain": gain, "diversity": diversity, "source": own, "duplicates": duplicates, "rows": np.exp(log_rows)}


def _write(config: RunConfig, features: np.ndarray, gains: np.ndarray) -> None:
    rows = [
        {
            "comparison": f"c{number}",
            "corpus": f"corpus{number // 4}",
            "workspace": f"s3://runs/{number // 4}",
            "source": f"source{number}",
            "metric": METRIC,
            "baseline": "random",
            "features": dict(zip(FEATURES, own.tolist(), strict=True)),
            "queries": 50,
            "gains": {"source": 0.0, "cluster": float(gain)},
            "errors": {},
        }
        for number, (own, gain) in enumerate(zip(features, gains, strict=True))
    ]
    assert config.predict.experience is not None
    Path(config.predict.experience).write_text(json.dumps(rows))


def test_a_row_does_not_foretell_itself() -> None:
    features, outcome = RANDOM.normal(size=(20, 4)), RANDOM.normal(size=(20, 2))
    before = left_out(features, outcome)
    outcome[7] += 100.0
    after = left_out(features, outcome)
    np.testing.assert_allclose(after[7], before[7])
    assert not np.allclose(after[6], before[6])


def test_what_is_left_out_is_foretold_by_ridge_on_the_others() -> None:
    features, outcome = RANDOM.normal(size=(12, 3)), RANDOM.normal(size=(12, 2))
    known, asked = np.delete(features, 5, axis=0), features[5]
    scaled = (known - known.mean(axis=0)) / known.std(axis=0)
    centre = np.delete(outcome, 5, axis=0).mean(axis=0)
    weights = np.linalg.solve(scaled.T @ scaled + 11 * np.eye(3), scaled.T @ (np.delete(outcome, 5, axis=0) - centre))
    expected = centre + (asked - known.mean(axis=0)) / known.std(axis=0) @ weights
    np.testing.assert_allclose(left_out(features, outcome)[5], expected)


def test_a_relation_is_worth_something_and_noise_is_not(tmp_path: Path) -> None:
    config = _config(tmp_path)
    features = RANDOM.normal(size=(40, len(FEATURES)))
    _write(config, features, 0.02 * features[:, 1])
    asked = {name: _source(features[row]) for name, row in (("low", 3), ("high", 9))}
    found = foretell(config, "another", asked)
    assert found["rows"] == 40
    assert found["arms"]["cluster"]["error"] < 0.7 * found["arms"]["cluster"]["guessing"]
    estimates = {name: row["gains"]["cluster"] for name, row in found["sources"].items()}
    assert (estimates["low"] < estimates["high"]) == (features[3, 1] < features[9, 1])
    # The row most like a source that is in the table is that source.
    assert [row["nearest"]["source"] for row in found["sources"].values()] == ["source3", "source9"]
    # Rows of the corpus itself are not asked.
    own = foretell(config, "corpus0", asked)
    assert own["rows"] == 36
    assert own["sources"]["low"]["nearest"]["source"] != "source3"
    _write(config, features, 0.02 * RANDOM.normal(size=40))
    noise = foretell(config, "another", asked)["arms"]["cluster"]
    assert noise["error"] > 0.9 * noise["guessing"]


def test_too_small_a_table_foretells_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path)
    asked = {"one": _source(np.ones(len(FEATURES)))}
    assert foretell(config, "another", asked)["rows"] == 0
    features = RANDOM.normal(size=(5, len(FEATURES)))
    _write(config, features, features[:, 0])
    assert foretell(config, "another", asked)["arms"] == {}
    assert config.predict.experience is not None
    Path(config.predict.experience).write_text("[1]")
    with pytest.raises(DataError, match="no table of outcomes"):
        read_table(config)
    Path(config.predict.experience).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_table(config)


def test_gains_are_those_of_the_queries_nearest_to_a_source() -> None:
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.03})
    nearest = {name: np.repeat(["one", "two", "few", ""], [200, 150, 9, 41]) for name in comparison.collections}
    found = source_gains(comparison, nearest)
    assert set(found) == {"one", "two"}
    assert found["one"]["queries"] == 400
    own, reference = (
        np.concatenate([comparison.scores[arm][name, METRIC][:, :200] for name in comparison.collections], axis=1)
        for arm in ("cluster", "random")
    )
    assert found["one"]["gains"] == {"cluster": pytest.approx((own - reference).mean())}
    assert 0 < found["one"]["errors"]["cluster"] < 0.02
