"""Ray, thinly: a session, and fixed units of work through a fixed pool of actors."""

from clusterbatch.runtime.progress import ProgressLine
from clusterbatch.runtime.resources import Pool, check_resources
from clusterbatch.runtime.session import lasting_session, ray_session
from clusterbatch.runtime.units import Ahead, Unit, UnitWorker, run_units

__all__ = [
    "Ahead",
    "Pool",
    "ProgressLine",
    "Unit",
    "UnitWorker",
    "check_resources",
    "lasting_session",
    "ray_session",
    "run_units",
]
