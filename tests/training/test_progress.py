"""Lines of the driver about the steps of a run."""

from __future__ import annotations

import pytest

from clusterbatch.runtime import ProgressLine
from clusterbatch.training.progress import ShownSteps


def _line(step: int, mask_rate: float) -> dict[str, float | int | None]:
    figures = dict.fromkeys(["loss", "gradient_norm", "memory_bytes", "tokens_per_second", "data_wait", "seconds"], 1.0)
    return {**figures, "step": step, "mask_rate": mask_rate, "mfu": None}


def test_a_step_whose_negatives_are_nearly_all_masked_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("train", total=8, unit="steps") as progress:
        shown = ShownSteps(progress, done=2)
        # Step 1 was done, and warned about, before the run was resumed; 0.95 of the negatives may go unremarked.
        for step, rate in enumerate([0.0, 1.0, 0.3, 0.95, 0.99, 1.0, 0.0, 1.0]):
            shown.show(_line(step, rate))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "mask" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("train: in step 4 the mask ignores 99% of the negatives")
