"""The Dockerfile's own steps, tried in a bare Debian without a container engine (root only):

    mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm base
    python -m tests.deploy.image_in_chroot base --arg VARIANT=cpu

Each stage begins with a copy of `base`; COPY copies, RUN runs in a chroot, ENV and ARG hold, and at the end the image's
command is run as the image's user. `--share PATH` shows a place of this machine inside (a package index, for
instance). It is no container: no layers, no isolation, no network of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    """A root file system under construction."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    command: list[str] = field(default_factory=list)

    def run(self, words: list[str]) -> None:
        """Raises CalledProcessError where the command fails."""
        user, _, group = self.user.partition(":")
        inside = [shutil.which("chroot") or "chroot", f"--userspec={user}:{group or user}", str(self.root)]
        inside += ["/bin/sh", "-c", f"cd {shlex.quote(self.folder)} && {shlex.join(words)}"]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        # pip's own settings of this machine: where its index is.
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        subprocess.run(inside, env={"PATH": path, "HOME": "/root", **settings, **self.environment}, check=True)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def build(dockerfile: Path, base: Path, folder: Path, given: dict[str, str], shared: list[Path]) -> Stage:
    """The last stage, built below `folder`."""
    arguments, stages, stage = dict(given), {}, Stage(folder)
    with ExitStack() as stack:
        for word, rest in instructions(dockerfile.read_text()):
            known = arguments | stage.environment
            rest = re.sub(r"\$\{(\w+)\}", lambda name, known=known: known.get(name[1], ""), rest)
            print(f"{word} {rest}", flush=True)
            if word == "FROM":
                name = rest.split(" AS ")[1]
                stage = stages[name] = Stage(folder / name)
                subprocess.run(["cp", "-a", str(base), str(stage.root)], check=True)
                stack.enter_context(mounted(stage.root, shared))
            elif word == "ARG":
                name, _, value = rest.partition("=")
                arguments.setdefault(name, value)
            elif word == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(rest))
                stage.environment |= {name: value.replace("$PATH", "/usr/bin:/bin") for name, _, value in pairs}
            elif word == "COPY":
                copy(rest.split(), stage, stages)
            elif word == "RUN":
                stage.run(["/bin/sh", "-ec", rest])
            elif word == "USER":
                stage.user = rest
            elif word == "WORKDIR":
                stage.folder = rest
            elif word == "CMD":
                stage.command = [word.strip('", ') for word in rest.strip("[]").split(",")]
            else:
                raise SystemExit(f"{dockerfile}: {word} is not known here")
        stage.run(stage.command)
        # As `ray up`, and KubeRay before 1.4, start Ray.
        stage.run(["bash", "--login", "-c", "command -v clusterbatch && command -v ray && command -v rsync"])
        stage.run(
            ["python3", "-c", "import clusterbatch, ray, torch; print(clusterbatch.__version__, torch.__version__)"]
        )
    return stage


def copy(words: list[str], stage: Stage, stages: dict[str, Stage]) -> None:
    flags = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    *sources, target = [word for word in words if not word.startswith("--")]
    start = stages[flags["from"]].root if "from" in flags else ROOT
    place = stage.root / target.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if target.endswith("/"):
        place.mkdir(exist_ok=True)
    for source in sources:
        subprocess.run(["cp", "-a", str(start / source.lstrip("/")), str(place)], check=True)
    if "chown" in flags:
        subprocess.run(["chown", "-R", flags["chown"], str(place)], check=True)


@contextmanager
def mounted(root: Path, shared: list[Path]) -> Iterator[None]:
    """What programs expect of a running system, and the shared places, read-only."""
    with ExitStack() as stack:
        for place in [Path("/proc"), Path("/dev"), *shared]:
            target = root / place.relative_to("/")
            if place.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            subprocess.run(["mount", "--bind", str(place), str(target)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(target)], check=True)
            if place in shared:
                subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a bare Debian")
    parser.add_argument("--into", type=Path, default=Path("image"), help="a new folder for the stages")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--share", action="append", default=[], type=Path, metavar="PATH")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("chroot needs root")
    options.into.mkdir(parents=True)
    given = dict(word.split("=", 1) for word in options.arg)
    stage = build(ROOT / "deploy" / "Dockerfile", options.base, options.into, given, options.share)
    size = subprocess.run(["du", "-smx", str(stage.root)], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"{stage.root}: {size} MiB")


if __name__ == "__main__":
    main()
