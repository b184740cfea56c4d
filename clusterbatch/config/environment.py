"""Sections `ray`, `storage` and `reuse`: where work runs and where bytes are stored. No key here changes a result."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from clusterbatch.config.base import Address, Section, operational


class RayConfig(Section):
    """The Ray cluster that stages run on. No key here changes a result."""

    mode: Literal["auto", "cluster", "local", "in-process"] = operational("cluster")
    """`cluster` runs stages on Ray; `local` in processes of this machine, without Ray; `in-process` in this process
    alone, for debugging. `auto` is `local` on Linux without a GPU if no cluster, runtime environment or object store is
    named, otherwise `cluster`."""
    address: str | None = operational(None)
    """Address of the cluster to join. Unset: RAY_ADDRESS, otherwise a cluster started on this machine for this run."""
    runtime_env: dict[str, Any] = operational({})
    """Ray's runtime environment for all workers."""
    startup_timeout: float = operational(0.0, ge=0)
    """Seconds that the cluster's autoscaler has to start the nodes a stage needs. 0: existing nodes must suffice."""
    num_cpus: int | None = operational(None, ge=1)
    """CPU cores that workers on this machine may use. Unset: all."""
    object_store_memory: int | None = operational(None, ge=80 * 2**20)
    """Bytes of the object store of a cluster started on this machine. Unset: Ray's default."""


class StorageConfig(Section):
    """S3-compatible storage. Credentials come from the environment or the machine's role, never from here."""

    endpoint_url: str | None = operational(None)
    """Address of the S3-compatible service. Unset: the environment's (AWS_ENDPOINT_URL), otherwise AWS."""
    region: str | None = operational(None)
    """Region of the buckets. Unset: the environment's."""
    addressing_style: Literal["auto", "path", "virtual"] = operational("auto")
    """Place of the bucket's name in addresses: in the path or in the host name."""
    ca_file: Address | None = operational(None)
    """File of certificates to check the endpoint against, instead of the system's."""
    verify_tls: bool = operational(True)
    """Check the endpoint's certificate."""
    attempts: int = operational(8, ge=1)
    """How often a request is tried that fails with 429, 500, 503, a reset or a time-out."""
    retry_budget: float = operational(120.0, ge=0)
    """Seconds after which a failing request is not tried again."""
    connect_timeout: float = operational(10.0, gt=0)
    """Seconds to wait for a connection."""
    read_timeout: float = operational(60.0, gt=0)
    """Seconds to wait for an answer."""

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

    Results do not depend on where an input is stored; its identity enters the fingerprint of everything made from it.
    """

    corpus: Address | None = operational(None)
    """Workspace whose corpus is used, with the sample if the corpus was mined from docstrings."""
    embeddings: Address | None = operational(None)
    """Workspace whose embeddings are used."""
    clusters: Address | None = operational(None)
    """Workspace whose clusters are used."""
