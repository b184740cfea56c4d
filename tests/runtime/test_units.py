import os
import re
import signal
from pathlib import Path

import pytest

from clusterbatch.errors import DataError, InfrastructureError
from clusterbatch.runtime import Ahead, Pool, Unit, run_units
from clusterbatch.runtime import units as motor
from clusterbatch.store import Artifact, Counts, Folder, Receipt


class Squares:
    """Writes unit number squared; unit `bad` fails, unit `deadly` kills its worker the first time."""

    def __init__(self, folder: Folder, bad: int | None = None, deadly: int | None = None) -> None:
        self.artifact = Artifact(folder, "squares")
        self.bad, self.deadly = bad, deadly

    def process(self, unit: Unit) -> Receipt:
        if unit.number == self.bad:
            raise DataError(f"file.csv: row {unit.number} is no number")
        marker = Path(self.artifact.folder.path("died"))
        if unit.number == self.deadly and not marker.exists():
            marker.parent.mkdir(exist_ok=True)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        data = str(unit.number**2).encode()
        part = self.artifact.write_part(f"unit-{unit.number}", "txt", data, rows=1)
        receipt = Receipt(unit=unit.number, fingerprint="f", parts=[part], counts=Counts(read=1, written=1))
        self.artifact.write_receipt(receipt)
        return receipt


def units(count: int) -> list[Unit]:
    return [Unit(number, 1, None) for number in range(count)]


@pytest.mark.usefixtures("ray_local")
def test_a_failed_unit_is_told_in_its_own_words_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(DataError, match=r"^file.csv: row 5 is no number$"):
        run_units("squares", units(8), Squares, {"folder": folder, "bad": 5}, Pool(1, cpus=0.5))
    done = Artifact(folder, "squares").begin("f")
    assert 0 < len(done) < 8
    receipts = run_units("squares", units(8), Squares, {"folder": folder}, Pool(2, cpus=0.5), done=done)
    assert [receipt.unit for receipt in receipts] == list(range(8))
    values = [int(Artifact(folder, "squares").read_part(receipt.parts[0])) for receipt in receipts]
    assert values == [number**2 for number in range(8)]


@pytest.mark.usefixtures("ray_local")
def test_a_killed_worker_costs_no_unit(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    receipts = run_units("squares", units(6), Squares, {"folder": folder, "deadly": 2}, Pool(1, cpus=0.5))
    assert (tmp_path / "died").exists()
    assert [receipt.unit for receipt in receipts] == list(range(6))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("pool", "words"), [(Pool(1, gpus=1), "needs 1 GPU"), (Pool(50), "ask for fewer workers")])
def test_what_can_never_be_scheduled_fails_in_one_line(tmp_path: Path, pool: Pool, words: str) -> None:
    with pytest.raises(InfrastructureError, match=words):
        run_units("squares", units(60), Squares, {"folder": Folder(str(tmp_path))}, pool)


def test_workers_and_those_who_prepare_for_them_each_want_a_place(tmp_path: Path, monkeypatch) -> None:
    def check(title: str, bundles: list[dict[str, float]]) -> None:
        raise InfrastructureError(f"{title}: {bundles}")

    monkeypatch.setattr(motor, "check_bundles", check)
    ahead = Ahead(Squares, {}, Pool(3, cpus=0.5))
    wanted = [{"CPU": 2.0, "GPU": 1.0}, *[{"CPU": 0.5}] * 3]
    with pytest.raises(InfrastructureError, match=re.escape(f"squares: {wanted}")):
        run_units("squares", units(9), Squares, {"folder": Folder(str(tmp_path))}, Pool(1, 2.0, 1.0), ahead=ahead)
