"""`reuse`: artifacts that another workspace has already.

`ray` and `storage`: where the work runs and where bytes live. Nothing here changes a result.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from clusterbatch.config.base import Address, Section, operational


class RayConfig(Section):
    # cluster: worker processes on Ray. in-process: everything in one process, without Ray, one item of work after the
    # other, with the same results; for a debugger or a small corpus.
    mode: Literal["cluster", "in-process"] = operational("cluster")
    # Unset: RAY_ADDRESS, else a cluster started for this run on this machine.
    address: str | None = operational(None)
    runtime_env: dict[str, Any] = operational({})
    # Seconds in which a cluster's autoscaler may start the nodes that a stage needs; 0: those that are there must do.
    startup_timeout: float = operational(0.0, ge=0)
    # The local cluster only.
    num_cpus: int | None = operational(None, ge=1)
    object_store_memory: int | None = operational(None, ge=80 * 2**20)


class StorageConfig(Section):
    """S3-compatible storage. Credentials come from the environment or the machine's role, never from here."""

    endpoint_url: str | None = operational(None)
    region: str | None = operational(None)
    addressing_style: Literal["auto", "path", "virtual"] = operational("auto")
    # Certificates of the endpoint are checked against this file instead of the system's.
    ca_file: str | None = operational(None)
    verify_tls: bool = operational(True)
    # How often a request is tried that fails with 429, 500, 503, a reset or a time-out, and for how many seconds.
    attempts: int = operational(8, ge=1)
    retry_budget: float = operational(120.0, ge=0)
    # Seconds to wait for a connection and for an answer.
    connect_timeout: float = operational(10.0, gt=0)
    read_timeout: float = operational(60.0, gt=0)

    @field_validator("endpoint_url")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError("credentials come from the environment, not from the address")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://host:port or https://host:port")
        return url.rstrip("/")


class ReuseConfig(Section):
    """Workspaces (URIs) whose artifacts are read in place of this one's own, and never written, `--force` or not.

    Results do not depend on where an input lies, and what it is goes into the fingerprint of what is made from it.
    """

    # With the sample, where the corpus is mined from docstrings.
    corpus: Address | None = operational(None)
    embeddings: Address | None = operational(None)
    clusters: Address | None = operational(None)
