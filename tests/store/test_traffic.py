"""Requests and bytes of storage are counted where they happen, and kept with the work that caused them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.traffic import since_last


@pytest.fixture(autouse=True)
def forget() -> None:
    since_last()


def test_requests_and_bytes_of_a_folder(tmp_path: Path):
    folder = Folder(str(tmp_path))
    folder.write("a", b"x" * 1000)
    folder.read("a", 0, 10)
    with folder.open("a") as file:
        file.seek(500)
        assert len(file.read()) == 500
    folder.list()
    folder.remove("a")
    found = since_last()
    assert (found.reads, found.writes, found.bytes_written) == (3, 2, 1000)
    # A file that is open is read in blocks, so that some bytes may be fetched that nobody asked for.
    assert 510 <= found.bytes_read <= 1010
    assert since_last().reads == 0


def test_units_and_artifacts_keep_what_they_asked_for(tmp_path: Path):
    artifact = Artifact(Folder(str(tmp_path)), "corpus")
    receipts = []
    for unit, size in enumerate((100, 10_000)):
        part = artifact.write_part("part", "bin", b"y" * size, 1)
        receipt = Receipt(unit=unit, fingerprint="f", parts=[part], counts=Counts(read=1, written=1))
        artifact.write_receipt(receipt)
        receipts.append(receipt)
    assert receipts[0].traffic.bytes_written == 100
    # The receipt of the first unit was written after it was counted.
    assert 10_000 < receipts[1].traffic.bytes_written < 11_000
    assert {each.traffic.bytes_written for each in artifact.begin("f").values()} == {
        each.traffic.bytes_written for each in receipts
    }
    manifest = artifact.commit("f", receipts, config={}, inputs={}, seconds=0.0)
    assert artifact.require().traffic == manifest.traffic
    assert manifest.traffic.bytes_written > 10_100
    assert manifest.traffic.writes >= 4
