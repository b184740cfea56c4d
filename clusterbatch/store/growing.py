"""Artifacts that grow: a later version extends the one before without changing it.

The first version is an ordinary artifact. Version n is in `versions/<n>` inside it, with its own parts, receipts and,
last, a manifest that names the parts of all versions, relative to the artifact's folder. Readers take the newest
version that is whole; one that was cut off while it was made does not exist for them.
"""

from __future__ import annotations

from collections.abc import Callable

from clusterbatch.store.artifact import MANIFEST, Artifact, Manifest, Receipt

VERSIONS = "versions"


class GrowingArtifact(Artifact):
    """An artifact that may have versions; its manifest is that of the newest one."""

    def manifest(self) -> Manifest | None:
        for name in reversed(self._names()):
            manifest = self._version(name).manifest()
            if manifest is not None:
                return manifest
        return super().manifest()

    def versions(self) -> list[Manifest]:
        """Return the manifests of all whole versions, oldest first; each counts all rows, not only its own."""
        first = super().manifest()
        later = [self._version(name).manifest() for name in self._names()]
        return [manifest for manifest in (first, *later) if manifest is not None]

    def next_version(self, base: Manifest) -> Version:
        """Return the version after `base`, to be made; it starts from scratch if other work was cut off there."""
        return Version(self, base)

    def _names(self) -> list[str]:
        """Names of the folders of versions, whole or not, ascending."""
        return sorted((name for name in self.folder.list(VERSIONS) if name.isdecimal()), key=int)

    def _version(self, name: str) -> Artifact:
        return Artifact(self.folder.child(VERSIONS, name), self.kind)

    def _manifest_names(self) -> list[str]:
        # The newest first: a half-removed artifact must at any moment look like one of its versions, or like none.
        return [*(f"{VERSIONS}/{name}/{MANIFEST}" for name in reversed(self._names())), MANIFEST]


def made_before(artifact: GrowingArtifact, identity_of: Callable[[str], str], corpus: Manifest) -> Manifest | None:
    """Return the artifact's newest version if it was made from an earlier version of `corpus`, with the same settings.

    Otherwise None. identity_of: maps the fingerprint of a corpus to that of the artifact made from it.
    """
    made = artifact.manifest()
    return made if made is not None and made.fingerprint in map(identity_of, corpus.earlier) else None


class Version(Artifact):
    """A version under construction.

    base: the manifest that it extends; its parts and counts may have been changed to what they are from now on.
    """

    def __init__(self, whole: GrowingArtifact, base: Manifest) -> None:
        self.base = base
        self.number = base.version + 1
        super().__init__(whole.folder.child(VERSIONS, f"{self.number:03d}"), whole.kind, whole.reused)

    def begin(self, fingerprint: str, force: bool = False) -> dict[int, Receipt]:
        # Nobody has read what is not committed: other work that was cut off here may go.
        return super().begin(fingerprint, force or self.manifest() is None)

    def path(self, name: str) -> str:
        """Return the name by which the manifest lists a file of this version."""
        return f"{VERSIONS}/{self.number:03d}/{name}"

    def _completed(self, manifest: Manifest) -> Manifest:
        own = [part.model_copy(update={"path": self.path(part.path)}) for part in manifest.parts]
        changes = {
            "parts": [*self.base.parts, *own],
            "counts": self.base.counts + manifest.counts,
            "earlier": self.base.lineage,
        }
        return manifest.model_copy(update=changes)
