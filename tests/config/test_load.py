import re
from pathlib import Path

import pytest

from clusterbatch import batches
from clusterbatch.config import BatchesConfig, RunConfig, TrainConfig, fingerprint, load_config, with_changes
from clusterbatch.errors import UsageError


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "workspace: here\ncluster:\n  mean_size: 100\ntrain:\n  learning_rate: 1e-3\n")
    config = load_config(path, ["cluster.mean_size=200", "corpus.paths=[a.parquet, b.parquet]", "train.epochs=2"])
    assert config.cluster.mean_size == 200
    assert config.corpus.paths == ["a.parquet", "b.parquet"]
    assert config.train.learning_rate == 1e-3


def test_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    assert load_config(None, ["workspace=w", "corpus.paths=a.parquet"]).corpus.paths == ["a.parquet"]


@pytest.mark.parametrize("key", ["corpus.sample_seed", "mine.seed", "cluster.seed", "batches.seed", "train.seed"])
def test_seeds_are_those_that_all_generators_take(key: str) -> None:
    load_config(None, ["workspace=w", f"{key}={2**63 - 1}"])
    for seed in (-1, 2**63, 2**64):
        with pytest.raises(UsageError, match=f"{key}: input should be (less|greater) than [^\n]*$"):
            load_config(None, ["workspace=w", f"{key}={seed}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "workspace: must be given"),
        (["workspace=w", "cluster.meansize=3"], "cluster.meansize: unknown key, did you mean cluster.mean_size?"),
        (["workspace=w", "nonsense.key=3"], "nonsense: unknown key"),
        (["workspace=w", "cluster.mean_size=many"], "cluster.mean_size: input should be a valid integer"),
        (["workspace=w", "batches.size=1"], "batches.size: input should be greater than or equal to 2"),
        (["workspace=w", "batches.stratify=clusters"], "batches.stratify: input should be"),
        (["workspace=w", "cluster.mean_size=3", "cluster.clusters=2"], "cluster: give clusters or mean_size"),
        (["workspace=w", "train.epochs=1", "train.steps=1"], "train: give epochs or steps"),
        (["workspace"], "'workspace': expected key=value"),
        (["workspace=s3:/bucket/a"], "workspace: expected s3://bucket/prefix (got 's3:/bucket/a')"),
        (["workspace=w", "workspace.deeper=3"], "workspace is a value, not a section"),
        (["workspace=w", "train.mask={"], "train.mask: input should be a section with keys of its own (got '{')"),
        (
            ["workspace=w", "train.mask={duplicates: true, duplicates: false}"],
            "train.mask: line 1: duplicates is given",
        ),
        (["workspace=w", "tune.candidates={train: [{steps: 5}, {steps: 6}]}"], "candidates: train is a section"),
        (["workspace=w", "corpus.encoding=base64"], "corpus.encoding: unknown encoding 'base64'"),
        (["workspace=w", "batches.clusters_per_batch=7"], "clusters_per_batch: 7 does not divide size 256"),
        (
            ["workspace=w", "batches.curriculum=[{steps: 5, clusters_per_batch: 3}, {}]"],
            "clusters_per_batch: 3 does not divide size 256",
        ),
        (["workspace=w", "batches.source_weights={a: -1}"], "source_weights.a: must be 0 or more"),
        (["workspace=w", "batches.source_weights={a: .nan}"], "source_weights.a: input should be a finite number"),
        (["workspace=w", "train.learning_rate=.inf"], "train.learning_rate: input should be a finite number"),
        (["workspace=w", "train.device=gpu"], "train.device: expected auto, cpu or cuda (got 'gpu')"),
        (
            ["workspace=w", "train.negatives=rubbish"],
            "configuration: train.negatives: input should be 'in_batch', 'hard' or 'both' or a map, such as "
            "{name: value} (got 'rubbish')",
        ),
        (
            ["workspace=w", "train.negatives={a: rubbish}"],
            "configuration: train.negatives.a: input should be 'in_batch', 'hard' or 'both' (got 'rubbish')",
        ),
        (["workspace=w", "tune.stream={arrivals: 2, refresh: [{}, 1]}"], "tune.stream.refresh.0: input should be a"),
        (["workspace=w", "train.workers=some"], "train.workers: expected a number, or [fewest, most] (got 'some')"),
        (["workspace=w", "train.workers=[2]"], "train.workers: expected a number, or [fewest, most] (got [2])"),
        (["workspace=w", "train.epochs=true"], "train.epochs: expected a number, not true or false"),
        (["workspace=w", "train.temperature=false"], "train.temperature: expected a number, not true or false"),
        (["workspace=w", "train.matryoshka=[64, yes]"], "train.matryoshka: expected a number, not true or false"),
        (["workspace=w", "train=null"], "train: input should be a section with keys of its own (got None)"),
        (["workspace=w", "corpus.paths=3"], "corpus.paths: input should be a list, such as [a, b] (got 3)"),
        (
            ["workspace=w", "train.filter.sources={a: {min_scor: 1}}"],
            "train.filter.sources.a.min_scor: unknown key, did you mean train.filter.sources.a.min_score?",
        ),
        (
            ["workspace=w", "batches.curriculum=[{stratfy: random}]"],
            "batches.curriculum.0.stratfy: unknown key, did you mean batches.curriculum.0.stratify?",
        ),
        (["workspace=w", "train.lora={rnk: 3}"], "train.lora.rnk: unknown key, did you mean train.lora.rank?"),
        (["workspace=w", "batches.source_weights={a: 2}", "batches.stratify=random"], "stratify: random"),
        (["workspace=w", "cluster.seed=-1"], "cluster.seed: input should be greater than or equal to 0"),
        (["workspace=w", "train.matryoshka=[8, 8]"], "matryoshka: one size is named twice"),
        (["workspace=w", "report.segment_pattern=("], "report.segment_pattern: not a regular expression"),
        (["workspace=w", "report.segment_pattern=abc"], "report.segment_pattern: expected a group in parentheses"),
        (["workspace=w", "train.epochs=2024-13-45"], "train.epochs: input should be a valid integer"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search(r"dict\[|literal\[|instance of|parse", str(caught.value))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("workspace=/runs/a #2", "/runs/a #2"),
        ("workspace=/runs/a=b", "/runs/a=b"),
        ("embed.query_prompt=query: ", "query: "),
        ("embed.document_prompt= passage ", " passage "),
        ("embed.query_prompt='quoted '", "quoted "),
        ("embed.query_prompt=", None),
        ("corpus.source=null", None),
        ("corpus.source=no", "no"),
        ("corpus.source=2024-01-01", "2024-01-01"),
        ("corpus.source=2024-13-45", "2024-13-45"),
        ("corpus.source=@work", "@work"),
        ("corpus.source=#1", "#1"),
        ("corpus.paths=a #2/*.parquet", ["a #2/*.parquet"]),
        ("corpus.paths=[0-9]*.parquet", ["[0-9]*.parquet"]),
        ("corpus.paths=[a, 'b #2']", ["a", "b #2"]),
        ("train.learning_rate= 1e-4", 1e-4),
        ("embed.persist=no", False),
        ("train.negatives=in_batch", "in_batch"),
    ],
)
def test_texts_of_a_command_line_are_whole(word: str, value: object) -> None:
    found = load_config(None, ["workspace=w", word])
    for name in word.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


def test_a_map_of_a_section_changes_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "workspace: w\nbatches: {size: 64, source_weights: {a: 2, b: 3}}\n")
    config = load_config(path, ["batches={stratify: source, source_weights: {c: 4}}", "train={mask: {duplicates: no}}"])
    assert (config.batches.size, config.batches.stratify, config.train.mask.duplicates) == (64, "source", False)
    # A map that is a value is one value.
    assert config.batches.source_weights == {"c": 4}
    assert with_changes(config, {"batches": {"seed": 1}}).batches == config.batches.model_copy(update={"seed": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "line 1: not valid YAML"), ("- a\n- b\n", "expected sections with keys"), ("\x00", "not valid YAML")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.yaml: No such file"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_fingerprints_follow_results_and_not_speed() -> None:
    def of(*words: str) -> str:
        config: RunConfig = load_config(None, ["workspace=w", *words])
        return fingerprint(config.cluster, config.train)

    assert of() == of("cluster.workers=7") == of("train.workers=3", "train.device=cpu")
    assert of() != of("cluster.seed=1")
    assert of() != of("train.mask.duplicates=false")


def test_off_is_a_word_also_where_yaml_takes_it_for_false() -> None:
    bare, quoted = (load_config(None, ["workspace=w", f"corpus.decontaminate={word}"]) for word in ("off", '"off"'))
    assert bare == quoted
    assert bare.corpus.decontaminate == "off"
    with pytest.raises(UsageError, match=r"corpus\.decontaminate"):
        load_config(None, ["workspace=w", "corpus.decontaminate=on"])


def test_every_shipped_configuration_loads() -> None:
    paths = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(str(path))


def test_the_comparison_that_is_shipped_has_as_many_runs_as_it_says() -> None:
    file = Path(__file__).parents[2] / "jobs" / "compare.yaml"
    compare = load_config(str(file)).compare
    assert f"built-in sample: {len(compare.arms) * compare.seeds} runs" in file.read_text()


def test_local_places_are_absolute_so_that_workers_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["workspace=runs/a", "reuse.corpus=runs/b", "train.model=my-model", "storage.ca_file=ca.pem"]
    config = load_config(None, words)
    assert config.workspace == str(tmp_path / "runs" / "a")
    assert config.reuse.corpus == str(tmp_path / "runs" / "b")
    assert config.train.model == str(tmp_path / "my-model")
    assert config.storage.ca_file == str(tmp_path / "ca.pem")
    # What is no folder here is a name, and a URI is a URI.
    config = load_config(None, ["workspace=s3://bucket/a", "train.model=all-MiniLM-L6-v2"])
    assert config.workspace == "s3://bucket/a"
    assert config.train.model == "all-MiniLM-L6-v2"


def test_the_page_on_resuming_names_the_keys_that_may_change() -> None:
    page = (Path(batches.__file__).parent / "README.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"^- \*\*What may change\*\*(.*?)\. So if", page, re.MULTILINE | re.DOTALL)
    may_change = {
        name
        for section in (TrainConfig, BatchesConfig)
        for name, field in section.model_fields.items()
        if field.json_schema_extra == {"operational": True}
    }
    assert set(re.findall(r"`(\w+)`", listed)) - {"train", "batches"} == may_change


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("workspace: w\ntrain:\n  steps: 3\ntrain:\n  epochs: 1\n")
    with pytest.raises(UsageError, match=r"twice\.yaml line 4: train is given twice"):
        load_config(str(file))


def test_what_looks_like_a_date_and_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml: not valid YAML"):
        load_config(write(tmp_path, "corpus:\n  source: 2024-13-45\n"))


def test_what_concerns_several_sections_names_them_and_nothing_else() -> None:
    with pytest.raises(UsageError) as raised:
        load_config(None, ["workspace=w", "corpus.paths=[a]", "train.mask.teacher_margin=0"])
    assert str(raised.value).startswith("configuration: train.mask.teacher_margin needs score.teacher")


@pytest.mark.parametrize("text", ["? [a, b]\n: c\n", "workspace: " + 3000 * "["], ids=["a list as key", "too deep"])
def test_yaml_that_no_section_can_be_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml.*: not valid YAML"):
        load_config(write(tmp_path, text))
