"""Loading of the configuration: a YAML file and `key=value` words become one checked `RunConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator

from clusterbatch.config.base import Address, Section
from clusterbatch.config.batches import BatchesConfig
from clusterbatch.config.compare import CompareConfig
from clusterbatch.config.environment import RayConfig, ReuseConfig, StorageConfig
from clusterbatch.config.experiments import PredictConfig, RefreshConfig, ReportConfig, TuneConfig
from clusterbatch.config.stages import (
    CHARACTER_NGRAMS,
    ClusterConfig,
    CorpusConfig,
    EmbedConfig,
    MineConfig,
    ScoreConfig,
)
from clusterbatch.config.training import EvaluateConfig, TrainConfig
from clusterbatch.errors import UsageError


class RunConfig(Section):
    """The whole configuration of a run, one section per stage."""

    workspace: Address
    """URI of the workspace, a local folder or s3://bucket/prefix, in which all artifacts are written."""
    corpus: CorpusConfig = CorpusConfig()
    """Input files and the rules for a valid pair."""
    embed: EmbedConfig = EmbedConfig()
    """The surrogate that embeds the corpus."""
    mine: MineConfig = MineConfig()
    """Hard negatives and consistent pairs, found by search."""
    cluster: ClusterConfig = ClusterConfig()
    """Clusters and shards."""
    score: ScoreConfig = ScoreConfig()
    """A teacher's scores, for masks and distillation."""
    batches: BatchesConfig = BatchesConfig()
    """The batch plan."""
    train: TrainConfig = TrainConfig()
    """The model to train and how."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Test collections, models and metrics."""
    refresh: RefreshConfig = RefreshConfig()
    """Further generations: embed, cluster and train again."""
    predict: PredictConfig = PredictConfig()
    """Figures of clustered batches before training."""
    tune: TuneConfig = TuneConfig()
    """Choice of settings by short runs."""
    compare: CompareConfig = CompareConfig()
    """Comparison of batch strategies."""
    report: ReportConfig = ReportConfig()
    """Presentation of results."""
    reuse: ReuseConfig = ReuseConfig()
    """Artifacts of other workspaces to read instead of making them."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""
    storage: StorageConfig = StorageConfig()
    """S3-compatible storage."""

    @model_validator(mode="after")
    def _margins(self) -> RunConfig:
        if self.train.margin_mse and not (self.mine.margins or self.score.is_on):
            raise ValueError("train.margin_mse needs mine.margins or score.teacher")
        if self.train.margin_mse and self.train.negatives == "in_batch" and not self.score.is_on:
            raise ValueError("train.margin_mse compares hard negatives, which train.negatives: in_batch leaves out")
        return self

    @model_validator(mode="after")
    def _super_batches(self) -> RunConfig:
        if self.batches.largest_super_batch > 1 and self.cluster.surrogate == "none":
            raise ValueError("batches.super_batch needs the surrogate's vectors (cluster.surrogate)")
        return self

    @model_validator(mode="after")
    def _teacher(self) -> RunConfig:
        mask = self.train.mask
        needing = {
            "train.mask.teacher_margin": mask.teacher_margin is not None,
            "train.mask.teacher_ranks": mask.teacher_ranks,
            "train.teacher_kl": self.train.teacher_kl,
        }
        for key, value in needing.items():
            if value and not self.score.is_on:
                raise ValueError(f"{key} needs score.teacher")
        if self.score.is_on and self.score.nearest and self.cluster.surrogate == "none":
            raise ValueError("score.nearest needs the surrogate's vectors (cluster.surrogate), or must be 0")
        if self.score.is_on and self.corpus.columns.images:
            raise ValueError("score.teacher: teachers score texts, not images (corpus.columns.images)")
        return self

    @property
    def needs_teacher(self) -> bool:
        """True if training reads the scores of `score.teacher`."""
        return self.train.needs_teacher(self.score.is_on)

    @model_validator(mode="after")
    def _hard_negatives(self) -> RunConfig:
        negatives = self.train.negatives
        hard = "hard" in negatives.values() if isinstance(negatives, dict) else negatives == "hard"
        given = self.reuse.clusters or self.reuse.corpus
        if hard and not (self.corpus.columns.negatives or self.mine.negatives or given):
            raise ValueError("train.negatives: hard needs corpus.columns.negatives or mine.negatives")
        return self

    @model_validator(mode="after")
    def _scores(self) -> RunConfig:
        columns, thresholds = self.corpus.columns, self.train.filter.all
        if self.reuse.clusters or self.reuse.corpus:
            return self
        if any(each.is_on for each in thresholds) and columns.score is None:
            raise ValueError("train.filter needs corpus.columns.score")
        if any(each.min_margin is not None for each in thresholds) and not columns.negative_scores:
            raise ValueError("train.filter.min_margin needs corpus.columns.negative_scores")
        return self

    @model_validator(mode="after")
    def _images(self) -> RunConfig:
        if self.corpus.columns.images:
            # Whether a named model has a tower for images shows when it is looked up.
            if self.embed.model == CHARACTER_NGRAMS:
                raise ValueError(f"corpus.columns.images: embed.model {CHARACTER_NGRAMS} is for texts alone")
            if self.train.encoder == "static":
                raise ValueError("corpus.columns.images needs train.encoder: backbone")
            if "bm25" in self.evaluate.models:
                raise ValueError("corpus.columns.images: evaluate.models bm25 is for texts alone")
        return self


def load_config(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (YAML, may be None), apply dotted overrides such as `cluster.mean_size=1024`, and check the result.

    Raises UsageError with one line that names the key if it is unknown, of the wrong type or impossible.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for word in overrides:
        _apply(values, word)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from None


def load_words(words: Sequence[str]) -> RunConfig:
    """Return what `load_config` does for the words of a command line: perhaps a file, then overrides.

    The path of a file may have an equals sign in it, as have those of folders in hive layout.
    """
    has_file = bool(words) and ("=" not in words[0] or os.path.isfile(words[0]))
    return load_config(words[0], words[1:]) if has_file else load_config(None, words)


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return `config` with the values of dotted keys replaced, and of a section those that a map of it names.

    Raises UsageError as `load_config` does.
    """
    values = config.model_dump()
    for key, value in dotted(changes).items():
        _set(values, key, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from None


def dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes` of dotted keys with a key for each that the maps of whole sections name, as files nest them."""
    found: dict[str, Any] = {}
    for key, value in changes.items():
        sections = [form for form in _forms_of(key) if isinstance(form, type) and issubclass(form, Section)]
        if sections and isinstance(value, dict) and value:
            found |= dotted({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            found[key] = value
    return found


class _RepeatedKeyError(Exception):
    """A key occurs twice in one section."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a repeated key is an error: YAML itself would let the last one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping. Raises _RepeatedKeyError."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # YAML's loader refuses these.
                continue
            if key.value in seen:
                raise _RepeatedKeyError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# Raised by `_parse`. A ValueError: something that looks like a date and is not one.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the root of the document and its value."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def shown_configuration(config: RunConfig) -> str:
    """Return the configuration as YAML that may be shown to others and loaded again.

    Without `ray.runtime_env`, which may hold credentials (`env_vars`); a comment says so if it was set.
    """
    values = config.model_dump(mode="json")
    hidden = values["ray"].pop("runtime_env")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# ray.runtime_env is not shown: it may hold credentials.\n{text}" if hidden else text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        _, values = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"configuration {path}: {error.strerror or error}") from None
    except _RepeatedKeyError as error:
        raise UsageError(f"configuration {path} {error}") from None
    except _NO_YAML as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        detail = "" if where or isinstance(error, UnicodeDecodeError) else f" ({error})"
        raise UsageError(f"configuration {path}{line}: not valid YAML{detail}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"configuration {path}: expected sections with keys, found a {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"{word!r}: expected key=value, for example cluster.mean_size=1024")
    key = key.strip()
    for name, value in dotted({key: _value(key, text)}).items():
        _set(values, name, value)


def _value(key: str, text: str) -> Any:
    """Return the value of an override: YAML's, but texts are whole, as a shell has unquoted them already.

    YAML would end `runs/a #2` at its comment, lose the space behind a prompt, and take `query: ` for a map.
    """
    try:
        node, value = _parse(text)
    except _RepeatedKeyError as error:
        raise UsageError(f"{key}: {error}") from None
    except _NO_YAML:
        return text
    if node is None:
        return text or None
    # Quotes, brackets and braces are YAML's.
    marked = node.style if isinstance(node, yaml.ScalarNode) else getattr(node, "flow_style", False)
    forms = _forms_of(key)
    takes_texts = isinstance(value, str) and any(get_origin(form) is list for form in forms)
    return text if not marked and ((str in forms and value is not None) or takes_texts) else value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    section = values
    for depth, name in enumerate(parents):
        below = section.setdefault(name, {})
        if below is None:
            below = section[name] = {}
        if not isinstance(below, dict):
            raise UsageError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        section = below
    section[leaf] = value


def _one_line(error: ValidationError) -> str:
    problems: list[tuple[str, str | None, str, str]] = []
    for item in error.errors(include_url=False):
        key, union = _key(item["loc"])
        got = "" if item["type"] in ("extra_forbidden", "missing", "value_error") else f" (got {item['input']!r})"
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(key, item['loc'])}"
        elif item["type"] == "missing":
            message = "must be given"
        else:
            message = _INPUTS.get(item["type"], item["msg"].removeprefix("Value error, ").split(", unable to parse")[0])
        problems.append((key, union, f"{message[0].lower()}{message[1:]}", got))
    # Of the forms that a value may have, the one that it has says more than those that it has not.
    inside = {union for key, union, *_ in problems if key != union}
    said: dict[tuple[str, str], list[str]] = {}
    for key, union, message, got in problems:
        if key not in inside or union != key:
            said.setdefault((key, got), []).append(message)
    # What concerns several sections has no key of its own, and names them itself.
    return "configuration: " + "; ".join(
        (f"{key}: " if key else "") + messages[0] + "".join(f" or {_short(each)}" for each in messages[1:]) + got
        for (key, got), messages in said.items()
    )


# Words for what pydantic calls by the names of Python's types.
_INPUTS = {
    "model_type": "input should be a section with keys of its own",
    "dict_type": "input should be a map, such as {name: value}",
    "list_type": "input should be a list, such as [a, b]",
}


def _short(message: str) -> str:
    return message.removeprefix("input should be ")


def _key(place: Sequence[int | str]) -> tuple[str, str | None]:
    """Return the dotted key of a problem, and that of the value around it which may have several forms, if any.

    place: pydantic's, in which each form has a name of its own, between the keys.
    """
    names: list[str] = []
    union = None
    kind: Any = RunConfig
    for part in place:
        if len(forms := _forms(kind)) > 1:
            union = ".".join(names)
            kind = next((form for form in forms if str(part).startswith(f"{getattr(form, '__name__', '')}[")), None)
        else:
            names.append(str(part))
            kind = _inside(kind, part)
    return ".".join(names), union


def _forms(kind: Any) -> list[Any]:
    """Return the types that a value may have, null aside."""
    if get_origin(kind) is Annotated:
        return _forms(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [form for each in get_args(kind) if each is not NoneType for form in _forms(each)]
    return [kind]


def _inside(kind: Any, part: int | str) -> Any:
    """Return the type of what a section, a map or a list has at `part`; None if that is unknown."""
    [form] = _forms(kind)
    if isinstance(form, type) and issubclass(form, Section):
        return form.model_fields[str(part)].annotation if part in form.model_fields else None
    return get_args(form)[-1] if get_origin(form) in (dict, list) else None


def _forms_of(key: str) -> list[Any]:
    """Return the types that the value of a dotted key may have; none if the key is unknown."""
    forms: list[Any] = [RunConfig]
    for name in key.split("."):
        inside = [_inside(form, name) for form in forms]
        forms = [form for kind in inside if kind is not None for form in _forms(kind)]
    return forms


def _suggestion(key: str, place: Sequence[int | str]) -> str:
    from difflib import get_close_matches

    section: Any = RunConfig
    for part in place[:-1]:
        section = _inside(section, part)
    [form] = _forms(section)
    names = form.model_fields if isinstance(form, type) and issubclass(form, Section) else ()
    close = get_close_matches(str(place[-1]), names, n=1)
    return f", did you mean {'.'.join([*key.split('.')[:-1], close[0]])}?" if close else ""
