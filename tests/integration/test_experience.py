"""A comparison leaves what it found in a table, once; a prediction reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterbatch.cli import main
from clusterbatch.experiments.predict.experience import FEATURES, read_table
from tests.integration.subjects import SUBJECTS, subjects_config
from tests.without_ray import WORDS, without_ray


def test_outcomes_are_kept_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    words = ["compare.arms=[random,source,cluster]", "compare.seeds=1", "compare.steps=3", "compare.points=1"]
    words += ["predict.rows=256", f"predict.experience={tmp_path}/table.json"]
    config = subjects_config(tmp_path, [*WORDS, *words])
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())
    assert main(["compare", str(file), "--json"]) == 0
    rows = read_table(config)
    assert {row["source"] for row in rows} <= set(SUBJECTS)
    assert rows
    for row in rows:
        assert set(row["features"]) == set(FEATURES)
        assert set(row["gains"]) == {"source", "cluster"}
        assert row["baseline"] == "random"
    # The same comparison again: no row is there twice.
    assert main(["compare", str(file), "--json"]) == 0
    assert read_table(config) == rows
    # To the corpus itself its own rows say nothing; as those of others they do.
    others = [{**rows[0], "corpus": f"other{number}", "comparison": f"c{number}"} for number in range(9)]
    (tmp_path / "table.json").write_text(json.dumps([*rows, *others]))
    capsys.readouterr()
    assert main(["predict", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["experience"]
    assert found["rows"] == len(others)
    assert set(found["sources"]) == set(SUBJECTS)
    for source in found["sources"].values():
        assert source["gains"] == pytest.approx(rows[0]["gains"])
    assert main(["predict", str(file)]) == 0
    assert "left out" in capsys.readouterr().out
