"""Reading of model folders that nobody vouches for: JSON, and safetensors inside the folder; never code or pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clusterbatch.errors import DataError, UsageError
from clusterbatch.store.entry import local_place


def read_config(folder: Path) -> dict[str, Any]:
    """Return the model's own config.json; empty if there is none."""
    config: dict[str, Any] = read_json(folder / "config.json") or {}
    return config


def read_json(path: Path) -> Any:
    """Return the content of a file, None if there is none. Raises DataError if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None


def check_names(folder: Path) -> None:
    """Raise DataError if a file of the model names another one outside of the model's folder."""
    for index in sorted(folder.glob("*.index.json")):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            raise DataError(f"{index}: no index of weights (weight_map is missing)")
        for name in sorted({str(name) for name in shards.values()}):
            place_inside(folder, name, index)
    tokenizer = read_json(folder / "tokenizer_config.json")
    # Other names in it are those of the machine that wrote it, and nothing reads them.
    for name in (tokenizer.get("fast_tokenizer_files") or []) if isinstance(tokenizer, dict) else []:
        place_inside(folder, str(name), folder / "tokenizer_config.json")


def place_inside(folder: Path, name: str, named_in: Path) -> Path:
    """Return the place of a file that `named_in` names. Raises DataError if it is not inside the folder."""
    try:
        return local_place(folder, name.rstrip("/"))
    except DataError:
        raise DataError(f"{named_in}: {name!r} is not a place inside the model's folder") from None


def check_weights(folder: Path) -> None:
    """Raise UsageError if there are weights only in formats that are not loaded, DataError if there are none."""
    if any(folder.glob("*.safetensors")):
        return
    others = [name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.onnx") for name in folder.glob(pattern)]
    if others:
        raise UsageError(
            f"{folder}: weights only as {others[0].name}, which is not loaded (pickles can run code); save the "
            "model in the safetensors format"
        )
    raise DataError(f"{folder}: no weights in the safetensors format (model.safetensors)")


def refuse_code(folder: Path, loader: str = "AutoModel") -> None:
    """Raise UsageError if the model is the code in its own folder, or in another repository.

    loader: the class of transformers that would load it, AutoModel or AutoModelForSequenceClassification.

    Models keep naming such code after transformers has taken it over, under the same class name.
    """
    config = read_config(folder)
    named = config.get("auto_map") or {}
    if not named:
        return
    # Imported here: it imports torch, which reading settings needs for no other model.
    from transformers.models.auto import modeling_auto

    names = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    own = names[loader].get(config.get("model_type", ""))
    code = str(named.get(loader) or next(iter(named.values())))
    if own is None or (loader in named and code.rsplit(".", 1)[-1] != own):
        raise UsageError(f"{folder}: needs code of its own ({code}, auto_map in config.json), which is not run")


def refuse_adapter(folder: Path) -> None:
    """Raise UsageError if the folder holds an adapter without its base model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: an adapter alone (adapter_config.json); merge it into its base model and save that"
        )
