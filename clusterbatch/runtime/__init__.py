"""Sessions, executors, and passes over work items."""

from clusterbatch.runtime.executor import Executor, InProcessExecutor, current_executor
from clusterbatch.runtime.local_executor import LocalExecutor
from clusterbatch.runtime.passes import Pass
from clusterbatch.runtime.progress import ProgressLine
from clusterbatch.runtime.resources import check_resources
from clusterbatch.runtime.session import lasting_session, ray_session
from clusterbatch.runtime.work import Ahead, Pool, Result, WorkItem, bundle_items

__all__ = [
    "Ahead",
    "Executor",
    "InProcessExecutor",
    "LocalExecutor",
    "Pass",
    "Pool",
    "ProgressLine",
    "Result",
    "WorkItem",
    "bundle_items",
    "check_resources",
    "current_executor",
    "lasting_session",
    "ray_session",
]
