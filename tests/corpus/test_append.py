"""A corpus that grows and shrinks: new versions take new files and drop rows; what is committed is never changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.cli import main
from clusterbatch.config import RunConfig
from clusterbatch.corpus.append import DocumentFilter
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.errors import DataError, OtherWorkError, UsageError
from clusterbatch.store import Artifact
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.corpus.test_ingest import configuration, corpus_rows, rejects, write_lines

SMALL: dict[str, Any] = {"row_group_rows": 64, "part_bytes": 2**16, "unit_bytes": 4096}


def _pairs(first: int, count: int, source: str = "site") -> list[dict[str, str]]:
    return [
        {"query": f"query {n}", "document": f"a document about {n}", "source": source, "id": f"pair-{n}"}
        for n in range(first, first + count)
    ]


def _config(folder: Path, holdout: int = 0, **corpus: Any) -> RunConfig:
    found = configuration(folder, [folder / "in"], **{**SMALL, "columns": {"pair_id": "id"}, **corpus})
    return found.model_copy(update={"evaluate": found.evaluate.model_copy(update={"holdout": holdout})})


def _ids(config: RunConfig) -> set[str]:
    return {row["pair_id"] for row in corpus_rows(config, Workspace(config).corpus.require())}


def _numbers(*of: range) -> set[str]:
    return {f"pair-{number}" for numbers in of for number in numbers}


def _bytes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_new_files_become_a_version_and_nothing_is_changed(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 300))
    config = _config(tmp_path)
    first = ingest(config)
    before = _bytes(tmp_path / "workspace")
    # 50 of these are there already, one stands there twice.
    write_lines(tmp_path / "in/two.jsonl", [*_pairs(250, 150), _pairs(399, 1)[0]])
    with pytest.raises(UsageError, match="--append adds"):
        ingest(config)
    second = ingest(config, append=True)
    assert (first.version, second.version, second.earlier) == (1, 2, [first.fingerprint])
    assert _ids(config) == _numbers(range(400))
    assert second.counts.model_dump() == {"read": 451, "written": 400, "rejected": 51, "set_aside": {}}
    assert second.details["sources"] == {"site": 400}
    assert {(Path(row["file"]).name, row["reason"]) for row in rejects(config, second)} == {
        ("two.jsonl", "duplicate pair")
    }
    after = _bytes(tmp_path / "workspace")
    assert before.items() <= after.items()
    # The units of the first version are the first of the second, under the same numbers.
    units = row_groups_of(first)
    assert row_groups_of(second)[: len(units)] == units
    # Again there is nothing new, whether one asks for it or not.
    assert ingest(config, append=True) == second == ingest(config)
    assert _bytes(tmp_path / "workspace") == after
    assert not list((tmp_path / "workspace").rglob("_*"))


def test_rows_are_dropped_by_id_and_by_source(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", [*_pairs(0, 200), *_pairs(200, 100, "shop"), *_pairs(300, 40, "board")])
    config = _config(tmp_path)
    ingest(config)
    # One id is unknown; a changed row comes in under its old id.
    gone = write_lines(tmp_path / "gone.txt", ["pair-3", "pair-77", "unknown"])
    changed = {**_pairs(77, 1)[0], "document": "another document"}
    write_lines(tmp_path / "in/two.jsonl", [changed, *_pairs(500, 10, "board")])
    dropping = {"delete": [str(gone)], "drop_sources": ["board"]}
    config = _config(tmp_path, **dropping)
    second = ingest(config, append=True)
    assert _ids(config) == _numbers(range(300)) - {"pair-3"}
    assert {row["document"] for row in corpus_rows(config, second) if row["pair_id"] == "pair-77"} == {
        changed["document"]
    }
    assert second.counts.set_aside == {"deleted": 52}
    assert second.counts.written == 299
    assert second.details["sources"] == {"shop": 100, "site": 199}
    # A list is applied once: the row that came in under this id stays.
    assert ingest(config, append=True) == second
    # What was dropped stays so, in versions that drop more, and as a pair it may come again.
    write_lines(tmp_path / "in/three.jsonl", _pairs(3, 1))
    more = write_lines(tmp_path / "more.txt", [f"pair-{number}" for number in range(200, 300)])
    config = _config(tmp_path, **{**dropping, "delete": [str(gone), str(more)]})
    third = ingest(config, append=True)
    assert _ids(config) == _numbers(range(200))
    assert third.version == 3
    assert third.details["sources"] == {"site": 200}
    # Units of which nothing is left keep their numbers.
    assert [unit.number for unit in row_groups_of(third)] == list(range(len(row_groups_of(third))))
    listed = [part for part in third.parts if part.details.get("role") == "deleted"]
    assert all(read_parquet(Workspace(config).corpus.folder, part).num_rows == part.rows for part in listed)
    everything = write_lines(tmp_path / "all.txt", [f"pair-{number}" for number in range(400)])
    with pytest.raises(DataError, match="no pair of the corpus would be left"):
        ingest(_config(tmp_path, delete=[str(everything)]), append=True)
    assert ingest(_config(tmp_path), append=True) == third


def test_what_is_held_out_stays_so(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 400))
    config = _config(tmp_path, holdout=40)
    first = ingest(config)
    collection = Path(config.workspace) / "corpus/holdout"
    before = _bytes(collection)
    queries = [json.loads(line)["text"] for line in (collection / "queries.jsonl").read_text().splitlines()]
    held = first.counts.set_aside["held out"]
    assert len(queries) == held > 20
    number = int(queries[0].split()[1])
    # The very pair, its query with another answer, and another question that its document answers.
    copies = [
        _pairs(number, 1)[0],
        {"query": queries[0].upper(), "document": "another answer", "source": "new", "id": "other-answer"},
        {"query": "another question", "document": f"a document about {number}", "source": "new", "id": "other-query"},
    ]
    write_lines(tmp_path / "in/two.jsonl", [*copies, *_pairs(400, 20, "new")])
    second = ingest(config, append=True)
    assert second.counts.set_aside == {"held out": held + 3}
    assert second.details["sources"] == {"new": 20, "site": 400 - held}
    assert _bytes(collection) == before
    aside = [part for part in second.parts if part.details.get("role") == "aside"]
    rows = [row for part in aside for row in read_parquet(Workspace(config).corpus.folder, part).to_pylist()]
    assert [row["reason"] for row in rows] == ["held out"] * 3


def test_near_copies_of_earlier_pairs_are_found(tmp_path: Path, in_process: None) -> None:
    long = "the harbour lies quiet under the evening tide while boats return with their nets and lamps one by one home"
    earlier = {"query": f"who comes home when {long}", "document": f"{long} and {long}", "source": "site", "id": "a"}
    write_lines(tmp_path / "in/one.jsonl", [earlier, *_pairs(0, 80)])
    config = _config(tmp_path, near_duplicates="set_aside")
    ingest(config)
    copy = {"query": f"{earlier['query']} today", "document": f"{earlier['document']} today", "source": "b", "id": "b"}
    write_lines(tmp_path / "in/two.jsonl", [copy, *_pairs(80, 5)])
    second = ingest(config, append=True)
    assert second.counts.set_aside == {"near duplicate of another pair": 1}
    assert _ids(config) == _numbers(range(85)) | {"a"}


def test_a_crash_leaves_the_version_before_and_is_gone_on_from(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 300))
    config = _config(tmp_path)
    first = ingest(config)
    write_lines(tmp_path / "in/two.jsonl", _pairs(300, 100))
    original, written = Artifact.write_receipt, 0

    def cut_off(self: Artifact, receipt: Any) -> None:
        nonlocal written
        original(self, receipt)
        written += 1
        if written in (2, 5, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "write_receipt", cut_off)
    cuts = 0
    while True:
        try:
            second = ingest(config, append=True)
            break
        except KeyboardInterrupt:
            cuts += 1
            assert Workspace(config).corpus.require() == first
            assert _ids(config) == _numbers(range(300))
    assert cuts == 3
    assert _ids(config) == _numbers(range(400))
    # Half of another version, made of files that have changed since, is begun anew.
    write_lines(tmp_path / "in/three.jsonl", _pairs(400, 100))
    written = -6
    with pytest.raises(KeyboardInterrupt):
        ingest(config, append=True)
    write_lines(tmp_path / "in/three.jsonl", _pairs(400, 50))
    written = 100
    third = ingest(config, append=True)
    assert (second.version, third.version) == (2, 3)
    assert _ids(config) == _numbers(range(450))


def test_the_command_says_what_it_appended(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 30))
    words = [f"workspace={tmp_path}/workspace", f"corpus.paths={tmp_path}/in", "evaluate.holdout=0"]
    assert main(["ingest", *words, "--append"]) == 0
    write_lines(tmp_path / "in/two.jsonl", _pairs(30, 12))
    assert main(["ingest", *words]) == 2
    assert "--append adds" in capsys.readouterr().err
    assert main(["ingest", *words, "--append"]) == 0
    assert "version 2: 12 pairs appended, 0 deleted" in capsys.readouterr().err
    assert main(["inspect", f"workspace={tmp_path}/workspace"]) == 0
    assert "version 2" in capsys.readouterr().out


def test_a_list_of_rows_to_delete_is_not_passed_over_in_silence(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 20))
    config = _config(tmp_path, delete=[str(write_lines(tmp_path / "gone.txt", ["pair-3"]))])
    for force in (False, True):
        assert ingest(config, force=force, append=True).counts.written == 20
        assert "corpus.delete applies only to" in capsys.readouterr().err
    assert ingest(config, append=True).counts.written == 19
    assert "corpus.delete" not in capsys.readouterr().err


def test_a_list_of_rows_to_delete_may_come_from_windows(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 20))
    (tmp_path / "gone.txt").write_bytes("pair-3\r\npair-5\r\n".encode("utf-8-sig"))
    config = _config(tmp_path, delete=[str(tmp_path / "gone.txt")])
    ingest(config)
    assert ingest(config, append=True).counts.written == 18


def test_other_rules_are_refused(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 20))
    ingest(_config(tmp_path))
    write_lines(tmp_path / "in/two.jsonl", _pairs(20, 20))
    with pytest.raises(UsageError, match=r"corpus\.max_characters is another"):
        ingest(_config(tmp_path, max_characters=100), append=True)
    with pytest.raises(UsageError, match=r"corpus\.delete: .*nowhere"):
        ingest(_config(tmp_path, delete=[str(tmp_path / "nowhere.txt")]), append=True)


def test_other_rules_are_refused_without_new_files_as_well(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/one.jsonl", _pairs(0, 20))
    first = _config(tmp_path)
    ingest(first)
    write_lines(tmp_path / "in/two.jsonl", _pairs(20, 20))
    second = ingest(first, append=True)
    assert ingest(first) == second
    tests = tmp_path / "tests"
    write_lines(tests / "corpus.jsonl", [{"_id": "d", "text": "a document about 3"}])
    write_lines(tests / "queries.jsonl", [{"_id": "q", "text": "query 3"}])
    write_lines(tests / "qrels/test.tsv", ["q\td\t1"])
    tested = first.model_copy(update={"evaluate": first.evaluate.model_copy(update={"path": [str(tests)]})})
    with pytest.raises(OtherWorkError, match=r"the collections of evaluate\.path.*--force replaces the corpus"):
        ingest(tested)
    with pytest.raises(OtherWorkError, match=r"corpus\.max_characters is another than .*20000"):
        ingest(_config(tmp_path, max_characters=100))
    with pytest.raises(OtherWorkError, match=r"corpus\.tsv_quotes is another"):
        ingest(_config(tmp_path, tsv_quotes=True))
    assert ingest(first) == second
    assert ingest(tested, force=True).counts.set_aside["copy of a test text"] == 1


def test_a_filter_passes_all_that_come_and_few_others() -> None:
    random = np.random.default_rng(1)
    new, others = (random.integers(0, 2**64, 5000, dtype=np.uint64) for _ in range(2))
    found = DocumentFilter([new[:3000], new[3000:]], len(new))
    assert found.may_have(new).all()
    assert found.may_have(others).mean() < 0.05
    assert not DocumentFilter([], 0).may_have(others).any()
