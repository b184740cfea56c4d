"""The configuration explains itself: every key has a meaning, and the printed file is a valid one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, load_config
from clusterbatch.config.describe import as_yaml, describe, differences
from clusterbatch.errors import UsageError


def leaves(values: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        below = value if isinstance(value, dict) and value else None
        found += leaves(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]
    return found


def test_every_key_is_listed_once_with_a_meaning() -> None:
    keys = describe()
    names = [key.name for key in keys]
    assert len(set(names)) == len(names)
    # Maps by name, whose own keys are no keys of the configuration.
    maps = ("tune.candidates", "compare.arms")
    expected = {name for name in leaves(RunConfig(workspace="w").model_dump()) if not name.startswith(maps)}
    assert {key.name for key in keys if key.within is None} == expected | set(maps)
    assert [key.name for key in keys if not key.meaning.endswith(".")] == []


def test_keys_of_optional_sections_and_of_those_in_lists_and_maps_are_listed() -> None:
    keys = {key.name: key for key in describe()}
    for name, above in (
        ("train.lora.rank", "train.lora"),
        ("train.filter.sources.<name>.min_score", "train.filter.sources"),
        ("train.source_prompts.<name>.query", "train.source_prompts"),
        ("batches.curriculum[].stratify", "batches.curriculum"),
        ("tune.stream.refresh", "tune.stream"),
        ("tune.stream.arrivals[].paths", "tune.stream.arrivals"),
    ):
        assert keys[name].within == above
        assert above in keys
    assert keys["train.lora.rank"].default == "16"
    assert keys["train.lora"].type == "section | null"
    assert load_config(None, ["workspace=w", "train.encoder=backbone", "train.lora.rank=8"]).train.lora is not None


def test_the_printed_file_is_the_default_configuration(tmp_path: Path) -> None:
    text = as_yaml()
    assert [line for line in text.splitlines() if len(line) > 120] == []
    (tmp_path / "all.yaml").write_text(text)
    assert yaml.safe_load(text)["workspace"] is None
    found = load_config(str(tmp_path / "all.yaml"), ["workspace=s3://bucket/run"])
    assert found == RunConfig(workspace="s3://bucket/run")


def test_sections_are_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "storage", "ray"]) == 0
    text = capsys.readouterr().out
    assert "storage.endpoint_url" in text
    assert "ray.address" in text
    assert "cluster." not in text
    assert {key.name.split(".")[0] for key in describe(["ray", "storage"])} == {"ray", "storage"}


def test_an_unknown_section_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="did you mean cluster"):
        describe(["clsuter"])
    assert main(["config", "clsuter"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_difference_of_two_configurations_is_every_key_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"one": ["batches.size=64"], "other": ["batches.size=128", "cluster.mean_size=512", "corpus.paths=[a.csv]"]}
    configs = {name: load_config(None, ["workspace=w", *each]) for name, each in words.items()}
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    files = [str(tmp_path / "one.yaml"), str(tmp_path / "other.yaml")]
    assert main(["config", "--difference", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    default = json.dumps(RunConfig(workspace="w").cluster.mean_size)
    assert lines == ['corpus.paths: [] -> ["a.csv"]', f"cluster.mean_size: {default} -> 512", "batches.size: 64 -> 128"]
    assert main(["config", "--json", "--difference", files[1], files[0]]) == 0
    assert {each["name"]: each["other"] for each in json.loads(capsys.readouterr().out)}["batches.size"] == "64"
    assert main(["config", "--difference", files[0], files[0]]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert differences(*configs.values())[0].name == "corpus.paths"


def test_keys_that_only_change_speed_are_told_apart() -> None:
    affects = {key.name: key.affects_results for key in describe()}
    assert not affects["train.workers"]
    assert affects["train.seed"]
