"""Artifacts that grow: a later version goes on from the one before, and changes nothing of it.

The first version is an ordinary artifact. Version n lies in `versions/<n>` inside it, with its own parts, receipts and,
last, a manifest that names the parts of all versions, relative to the artifact's folder. Readers take the newest
version that is whole; one that was cut off while it was made does not exist for them.
"""

from __future__ import annotations

from collections.abc import Callable

from clusterbatch.store.artifact import MANIFEST, Artifact, Manifest, Receipt

VERSIONS = "versions"


class GrowingArtifact(Artifact):
    """An artifact of which there may be versions; its manifest is the newest one's."""

    def manifest(self) -> Manifest | None:
        for name in reversed(self._names()):
            manifest = self._version(name).manifest()
            if manifest is not None:
                return manifest
        return super().manifest()

    def versions(self) -> list[Manifest]:
        """The manifests of all whole versions, the first one first; the newest counts all rows, as each one does."""
        first = super().manifest()
        later = [self._version(name).manifest() for name in self._names()]
        return [manifest for manifest in (first, *later) if manifest is not None]

    def next_version(self, base: Manifest) -> Version:
        """The version behind that of `base`, to be made; begun anew where other work was cut off there."""
        return Version(self, base)

    def _names(self) -> list[str]:
        """Of the folders of versions, whole or not, ascending."""
        return sorted((name for name in self.folder.list(VERSIONS) if name.isdecimal()), key=int)

    def _version(self, name: str) -> Artifact:
        return Artifact(self.folder.child(VERSIONS, name), self.kind)

    def _forget(self) -> None:
        # The newest first: what is half removed must at any moment look like one of the versions, or like nothing.
        for name in reversed(self._names()):
            self.folder.remove(f"{VERSIONS}/{name}/{MANIFEST}")
        super()._forget()


def made_before(artifact: GrowingArtifact, identity_of: Callable[[str], str], corpus: Manifest) -> Manifest | None:
    """The artifact's newest version, where it was made as now of an earlier version of `corpus`; else None.

    identity_of: the fingerprint of what is made of the corpus of a fingerprint.
    """
    made = artifact.manifest()
    return made if made is not None and made.fingerprint in map(identity_of, corpus.earlier) else None


class Version(Artifact):
    """A version under construction. `base`: the manifest that it goes on from; parts and counts may have been changed
    to what they are from now on."""

    def __init__(self, whole: GrowingArtifact, base: Manifest) -> None:
        self.base = base
        self.number = base.version + 1
        super().__init__(whole.folder.child(VERSIONS, f"{self.number:03d}"), whole.kind, whole.reused)

    def begin(self, fingerprint: str, force: bool = False) -> dict[int, Receipt]:
        # What is not committed nobody has seen: other work that was cut off here may go.
        return super().begin(fingerprint, force or self.manifest() is None)

    def path(self, name: str) -> str:
        """As the manifest names a file of this version."""
        return f"{VERSIONS}/{self.number:03d}/{name}"

    def _completed(self, manifest: Manifest) -> Manifest:
        own = [part.model_copy(update={"path": self.path(part.path)}) for part in manifest.parts]
        changes = {
            "parts": [*self.base.parts, *own],
            "counts": self.base.counts + manifest.counts,
            "earlier": self.base.lineage,
        }
        return manifest.model_copy(update=changes)
