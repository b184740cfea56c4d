"""The few verbs of a folder on a real S3 server, undisturbed and with each kind of fault."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.pipeline.clean import clean
from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.lease import workspace_lease
from clusterbatch.store.traffic import since_last
from clusterbatch.store.workspace import Workspace, publish
from tests.integration.s3.fault_proxy import FaultProxy
from tests.integration.s3.server import ACCESS_KEY, DOMAIN, READER_KEY, READER_SECRET, SECRET_KEY, S3Server
from tests.integration.s3.swift import let_reader_read

pytestmark = pytest.mark.s3


def through(proxy: FaultProxy, **options: float) -> StorageConfig:
    return StorageConfig(endpoint_url=proxy.endpoint_url, read_timeout=options.pop("read_timeout", 20.0), **options)


def test_files_are_written_listed_read_and_removed(storage: StorageConfig, bucket: str) -> None:
    folder = Folder(f"s3://{bucket}/run", storage)
    data = os.urandom(300_000)
    folder.write("deep/below/file.bin", data)
    folder.write("deep/below-too.bin", b"")
    assert folder.list() == ["deep"]
    assert folder.list("deep") == ["below", "below-too.bin"]
    assert [(entry.name, entry.size) for entry in folder.find()] == [
        ("deep/below-too.bin", 0),
        ("deep/below/file.bin", 300_000),
    ]
    assert [entry.name for entry in folder.find("deep/*.bin")] == ["deep/below-too.bin"]
    assert folder.read("deep/below/file.bin") == data
    assert folder.read("deep/below/file.bin", 1000, 2000) == data[1000:2000]
    assert folder.read("deep/below-too.bin") == b""
    with folder.open("deep/below/file.bin", 4096) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(5)
        assert file.read(100_000) == data[5:100_005]
    folder.remove("deep/below")
    assert folder.list("deep") == ["below-too.bin"]
    with pytest.raises(FileNotFoundError):
        folder.read("deep/below/file.bin")


def test_a_large_file_goes_up_in_parts_and_leaves_none_behind(storage: StorageConfig, bucket: str) -> None:
    folder = Folder(f"s3://{bucket}", storage)
    data = os.urandom(2**20) * 101
    folder.write("large", data)
    assert folder.read("large") == data


def test_folder_markers_are_no_files(storage: StorageConfig, bucket: str) -> None:
    """Tools that copy folders write an empty object for each, whose key ends in a slash."""
    config = RunConfig(workspace=f"s3://{bucket}/run", storage=storage)
    workspace = Workspace(config)
    client = workspace.root.filesystem

    def mark(*folders: str) -> None:
        for name in folders:
            client.call_s3("put_object", Bucket=bucket, Key=f"run/{name}/", Body=b"")

    mark("corpus", "corpus/_receipts", "corpus/empty/below", "model", "model/deep", "generation=000/train/model")
    part = workspace.corpus.write_part("part", "bin", b"kept", 1)
    receipt = Receipt(unit=0, fingerprint="f", parts=[part], counts=Counts(read=1, written=1))
    workspace.corpus.write_receipt(receipt)
    assert list(workspace.corpus.begin("f")) == [0]
    workspace.corpus.commit("f", [receipt], config={}, inputs={}, seconds=0.0)
    mark("corpus", "corpus/_receipts")
    assert {entry.name for entry in workspace.corpus.folder.find()} == {"manifest.json", part.path}
    assert set(workspace.corpus.folder.list()) - {"empty", "_receipts"} == {"manifest.json", part.path}
    assert workspace.corpus.folder.list("_receipts") == []
    assert [entry.name for entry in workspace.root.find("corpus/*")] == sorted(
        ["corpus/manifest.json", f"corpus/{part.path}"]
    )
    assert not workspace.model.exists("deep")
    with pytest.raises(DataError, match="no model here"):
        publish(workspace, 0)
    for name in ("config.json", "model.safetensors"):
        workspace.trained_model().write(name, name.encode())
    publish(workspace, 0)
    mark("model")
    publish(workspace, 0)
    assert clean(config, dry_run=False) == []
    assert workspace.corpus.read_part(part) == b"kept"
    assert workspace.model.read("model.safetensors") == b"model.safetensors"
    # What is removed as a whole goes with its markers.
    workspace.root.remove("corpus")
    listed = client.call_s3("list_objects_v2", Bucket=bucket, Prefix="run/corpus")
    assert listed.get("Contents", []) == []


@pytest.mark.parametrize("name", ["a//b.jsonl", "/b.jsonl", "c.jsonl?versionId=abc", "d e+f%20.jsonl", "[x].jsonl"])
def test_keys_are_taken_literally(storage: StorageConfig, bucket: str, name: str) -> None:
    folder = Folder(f"s3://{bucket}/run", storage)
    folder.filesystem.call_s3("put_object", Bucket=bucket, Key=f"run/{name}", Body=b"0123456789")
    [entry] = folder.find()
    assert (entry.name, entry.size) == (name, 10)
    assert folder.size(name) == 10
    assert folder.exists(name)
    assert folder.read(name) == b"0123456789"
    assert folder.read(name, 2, 4) == b"23"
    with folder.open(name, 4) as file:
        assert file.read() == b"0123456789"
    folder.remove(name)
    assert folder.find() == []


def test_ranges_end_where_the_object_ends(storage: StorageConfig, bucket: str, tmp_path: Path) -> None:
    here, there = Folder(str(tmp_path)), Folder(f"s3://{bucket}/run", storage)
    for folder in (here, there):
        folder.write("file", b"0123456789")
        folder.write("empty", b"")
    for span in ((0, 0), (4, 4), (10, 12), (9, 50), (5, None), (None, 3), (12, None)):
        assert there.read("file", *span) == here.read("file", *span)
        assert there.read("empty", *span) == b""


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jsonl",
        "b/*.jsonl",
        "*/x.jsonl",
        "b*/x*.jsonl",
        "**/x.jsonl",
        "b/**/*.jsonl",
        "a.jsonl",
        "?.jsonl",
        "[ab].jsonl",
    ],
)
def test_patterns_match_as_on_disk(storage: StorageConfig, bucket: str, tmp_path: Path, pattern: str) -> None:
    here, there = Folder(str(tmp_path)), Folder(f"s3://{bucket}/run", storage)
    for name in ("a.jsonl", "a.jsonl.bak", "b/x.jsonl", "b/c/x.jsonl", "b/c/y.jsonl", "bb/x1.jsonl", "other/z.txt"):
        for folder in (here, there):
            folder.write(name, b"x")
    found = [entry.name for entry in there.find(pattern)]
    assert found == [entry.name for entry in here.find(pattern)]
    assert found


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        ("slow_down", "PUT"),
        ("too_many", "PUT"),
        ("server_error", "PUT"),
        ("reset", "PUT"),
        ("drop_answer", "PUT"),
        ("slow_down", "GET"),
        ("too_many", "GET"),
        ("server_error", "GET"),
        ("reset", "GET"),
        ("drop_answer", "GET"),
        ("reset_body", "GET"),
        ("truncate", "GET"),
        ("latency", "GET"),
        ("hang", "GET"),
    ],
)
def test_what_passes_by_itself_is_tried_again(s3_server: S3Server, bucket: str, fault: str, method: str) -> None:
    data = os.urandom(200_000)
    with FaultProxy(s3_server.port, hang_seconds=2.0) as proxy:
        folder = Folder(f"s3://{bucket}/run", through(proxy, read_timeout=1.0))
        proxy.plan(fault, method=method, path="/run/file", times=2)
        folder.write("file", data)
        assert folder.read("file") == data
        assert folder.read("file", 1000, 9000) == data[1000:9000]
        assert proxy.injected[fault] == 2


def test_attempts_end_with_the_budget_and_one_line(s3_server: S3Server, bucket: str) -> None:
    with FaultProxy(s3_server.port) as proxy:
        folder = Folder(f"s3://{bucket}/run", through(proxy, retry_budget=5.0))
        proxy.plan("slow_down", path="/run/file", times=-1)
        start = time.monotonic()
        with pytest.raises(InfrastructureError, match=rf"503 SlowDown \(bucket {bucket} at .*attempts in") as caught:
            folder.write("file", b"x")
        assert time.monotonic() - start < 30
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_buckets_are_addressed_by_path_or_by_host(
    style: str, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: set[str] = set()
    resolve = socket.getaddrinfo

    def resolve_here(host: str, *arguments: Any, **keywords: Any) -> Any:
        hosts.add(host)
        return resolve("127.0.0.1" if host.endswith(DOMAIN) else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    storage = StorageConfig(endpoint_url=f"http://{DOMAIN}:{s3_server.port}", addressing_style=style)
    folder = Folder(f"s3://{bucket}/run", storage)
    folder.write("file", b"content")
    assert folder.read("file") == b"content"
    assert [entry.name for entry in folder.find()] == ["file"]
    assert hosts == ({DOMAIN} if style == "path" else {f"{bucket}.{DOMAIN}"})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of 127.0.0.1 that nobody has signed, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + key.read_bytes())
    return file


def test_tls_with_the_users_own_authority(s3_server: S3Server, bucket: str, certificate: Path) -> None:
    with FaultProxy(s3_server.port, certificate=certificate) as proxy:
        trusting = Folder(f"s3://{bucket}/run", through(proxy).model_copy(update={"ca_file": str(certificate)}))
        trusting.write("file", b"content")
        assert trusting.read("file") == b"content"
        careless = Folder(f"s3://{bucket}/run", through(proxy).model_copy(update={"verify_tls": False}))
        assert careless.read("file") == b"content"
        with pytest.raises(InfrastructureError, match=r"certificate is not trusted; storage.ca_file") as caught:
            Folder(f"s3://{bucket}/run", through(proxy)).read("file")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", ["write", "read", "list", "find"])
def test_a_missing_bucket_is_named_and_not_tried_again(s3_server: S3Server, verb: str) -> None:
    with FaultProxy(s3_server.port) as proxy:
        folder = Folder("s3://no-such-bucket/run", through(proxy))
        arguments = {"write": ("x", b"x"), "read": ("x",), "list": (), "find": ()}[verb]
        with pytest.raises(InfrastructureError, match="bucket no-such-bucket does not exist"):
            getattr(folder, verb)(*arguments)
        assert sum(proxy.requests.values()) <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "the credentials are not accepted"),
        ({"AWS_ACCESS_KEY_ID": "nobody:nobody"}, "access denied"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials"),
    ],
)
def test_wrong_credentials_are_one_line_without_them(
    s3_server: S3Server, bucket: str, changes: dict[str, str], message: str
) -> None:
    # In a process of its own: connections keep the credentials that they were made with.
    program = (
        "from clusterbatch.store import Folder\nfrom clusterbatch.config import StorageConfig\n"
        f"Folder('s3://{bucket}/run', StorageConfig(endpoint_url='{s3_server.endpoint_url}')).read('x')"
    )
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("clusterbatch.errors.InfrastructureError")
    assert message in last
    assert f"bucket {bucket}" in last
    for secret in (SECRET_KEY, "wrong-secret", ACCESS_KEY, "nobody:nobody"):
        assert secret not in last


@pytest.mark.parametrize("command", ["run", "ingest", "clean", "compare"])
def test_a_workspace_that_may_only_be_read_is_refused_before_any_work(
    s3_server: S3Server, storage: StorageConfig, bucket: str, command: str
) -> None:
    if "Swift" not in s3_server.name:
        pytest.skip("this server has one user")
    let_reader_read(s3_server, bucket)
    pairs = "".join(f'{{"query": "q {n}", "document": "d {n}"}}\n' for n in range(300))
    Folder(f"s3://{bucket}", storage).write("pairs.jsonl", pairs.encode())
    words = [f"workspace=s3://{bucket}/run", f"corpus.paths=s3://{bucket}/pairs.jsonl", "embed.model=char-ngrams"]
    words += [f"storage.endpoint_url={s3_server.endpoint_url}", "ray.mode=in-process"]
    reader = {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}
    done = subprocess.run(
        [sys.executable, "-m", "clusterbatch", command, *words],
        env={**os.environ, **reader},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (4, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"clusterbatch: s3://{bucket}/run/_lease.json: access denied")
    assert [entry.name for entry in Folder(f"s3://{bucket}", storage).find()] == ["pairs.jsonl"]


def test_a_client_with_another_region_learns_it_whatever_it_asks_first(storage: StorageConfig, bucket: str) -> None:
    Folder(f"s3://{bucket}", storage).write("x", b"abc")
    for number, verb in enumerate(["size", "exists", "read"]):
        # A connection of its own for each.
        elsewhere = storage.model_copy(update={"region": f"eu-nowhere-{number}"})
        assert getattr(Folder(f"s3://{bucket}", elsewhere), verb)("x") in (3, True, b"abc")
    with pytest.raises(FileNotFoundError):
        Folder(f"s3://{bucket}", storage.model_copy(update={"region": "eu-nowhere-9"})).size("y")


def test_a_service_of_the_environment_is_named_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hidden@127.0.0.1:9")
    with pytest.raises(InfrastructureError, match=r"http://127\.0\.0\.1:9\b") as caught:
        Folder("s3://somewhere/run", StorageConfig(attempts=1)).list()
    assert "hidden" not in str(caught.value)


def test_an_endpoint_that_does_not_answer_is_named_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    # No server is needed, so none may have been started with its credentials.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    start = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"cannot reach http://127.0.0.1:9 .*bucket somewhere"):
        Folder("s3://somewhere/run", StorageConfig(endpoint_url="http://127.0.0.1:9")).list()
    assert time.monotonic() - start < 15


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="come from the environment") as caught:
        Folder("s3://key:secret@bucket/run")
    assert "secret@" not in str(caught.value)
    with pytest.raises(ValueError, match="come from the environment"):
        StorageConfig(endpoint_url="http://key:secret@host")


def test_one_damaged_download_is_read_again_and_a_damaged_file_is_named(s3_server: S3Server, bucket: str) -> None:
    with FaultProxy(s3_server.port) as proxy:
        artifact = Artifact(Folder(f"s3://{bucket}/corpus", through(proxy)), "corpus")
        part = artifact.write_part("part", "bin", os.urandom(100_000), 1)
        artifact.write_receipt(Receipt(unit=0, fingerprint="f", parts=[part], counts=Counts(read=1, written=1)))
        proxy.plan("corrupt", method="GET", path=part.path)
        artifact.read_part(part)
        assert proxy.injected["corrupt"] == 1
        proxy.plan("corrupt", method="GET", path=part.path, times=-1)
        with pytest.raises(DataError, match=rf"{part.path}: damaged"):
            artifact.read_part(part)


def test_a_damaged_download_is_noticed_where_no_checksum_of_ours_is(s3_server: S3Server, bucket: str) -> None:
    data = os.urandom(50_000)
    with FaultProxy(s3_server.port) as proxy:
        folder = Folder(f"s3://{bucket}/run", through(proxy))
        folder.write("manifest.json", data)
        proxy.plan("corrupt", method="GET", path="manifest.json")
        assert folder.read("manifest.json") == data
        proxy.plan("corrupt", method="GET", path="manifest.json")
        with folder.open("manifest.json") as file:
            # From the end, as Parquet is read.
            file.seek(-1000, os.SEEK_END)
            assert file.read() == data[-1000:]
            file.seek(0)
            assert file.read() == data
        assert proxy.injected["corrupt"] == 2


def test_a_failed_upload_in_parts_is_aborted(s3_server: S3Server, storage: StorageConfig, bucket: str) -> None:
    with FaultProxy(s3_server.port) as proxy:
        folder = Folder(f"s3://{bucket}", through(proxy, attempts=1))
        proxy.plan("server_error", method="PUT", path="partNumber=2", times=-1)
        with pytest.raises(InfrastructureError, match="500 InternalError"):
            folder.write("large", bytes(101 * 2**20))
    listed = Folder(f"s3://{bucket}", storage).filesystem.call_s3("list_multipart_uploads", Bucket=bucket)
    assert listed.get("Uploads", []) == []


def test_clean_aborts_what_a_killed_upload_left(storage: StorageConfig, bucket: str) -> None:
    config = RunConfig(workspace=f"s3://{bucket}/run", storage=storage)
    filesystem = Folder(config.workspace, storage).filesystem
    for key in ("run/corpus/part.parquet", "run/model/weights", "other/file"):
        begun = filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        part = {"UploadId": begun["UploadId"], "PartNumber": 1, "Body": bytes(5 * 2**20)}
        filesystem.call_s3("upload_part", Bucket=bucket, Key=key, **part)

    def uploads() -> list[str]:
        listed = filesystem.call_s3("list_multipart_uploads", Bucket=bucket)
        return sorted(item["Key"] for item in listed.get("Uploads", []))

    found = clean(config)
    assert sorted(removal.path for removal in found) == ["corpus/part.parquet", "model/weights"]
    assert len(uploads()) == 3
    clean(config, dry_run=False)
    assert uploads() == ["other/file"]
    assert clean(config) == []


def test_a_workspace_on_s3_is_leased_to_one_run(storage: StorageConfig, bucket: str) -> None:
    config = RunConfig(workspace=f"s3://{bucket}/run", storage=storage)
    with (
        workspace_lease(config),
        pytest.raises(InfrastructureError, match="in use by process"),
        workspace_lease(config),
    ):
        pass
    with workspace_lease(config):
        pass


def test_pieces_of_a_file_are_all_of_one_object(storage: StorageConfig, bucket: str) -> None:
    folder = Folder(f"s3://{bucket}/run", storage)
    folder.write("file", b"a" * 10_000)
    with folder.open("file", 4096) as file:
        assert file.read(4096) == b"a" * 4096
        folder.write("file", b"b" * 10_000)
        with pytest.raises(InfrastructureError, match=f"s3://{bucket}/run/file: was replaced while it was read"):
            file.read()
    with folder.open("file", 4096) as file:
        assert file.read() == b"b" * 10_000


def test_pieces_of_a_file_that_went_up_in_parts(storage: StorageConfig, bucket: str) -> None:
    """Its ETag is not the content's MD5, and some servers keep it beside the object's own."""
    folder = Folder(f"s3://{bucket}", storage)
    data = os.urandom(2**20) * 101
    folder.write("large", data)
    with folder.open("large") as file:
        assert file.read(10) == data[:10]
        since_last()
        assert file.read() == data[10:]
        assert since_last().reads == 1
