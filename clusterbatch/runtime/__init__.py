"""Ray, thinly: a session, and fixed units of work through a fixed pool of actors."""

from clusterbatch.runtime.progress import ProgressLine
from clusterbatch.runtime.session import lasting_session, ray_session
from clusterbatch.runtime.units import Pool, Unit, UnitWorker, run_units

__all__ = ["Pool", "ProgressLine", "Unit", "UnitWorker", "lasting_session", "ray_session", "run_units"]
