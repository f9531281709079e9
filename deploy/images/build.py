"""Build Wardround's images with docker, podman or buildah, whichever is there: `make images`.

The Dockerfiles need nothing of this: it adds names, sizes, SBOMs and archives, and hands this machine's pip settings
(index, certificates, folders of wheels) to the build stage, read-only, so that nothing of them stays in an image.
Needs Python 3.11 and its standard library only.
"""

import argparse
import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {
    "aggregator": "services/aggregator/Dockerfile",
    "keyshare": "services/keyshare/Dockerfile",
    "cli": "services/cli/Dockerfile",
    "hospital-node": "services/hospital_node/Dockerfile",
}
ENGINES = ("docker", "podman", "buildah")
SBOM = "opt/wardround/sbom.cdx.json"
# What changes where pip looks; a setting that would change what it does with packages is this machine's own business.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "cert",
    "client-cert",
    "trusted-host",
    "constraint",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
)


@dataclass
class PipSettings:
    """What the build stage's pip is told: a pip.conf, and the files and folders of this machine that it names."""

    values: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The pip.conf."""
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in self.values.items())

    @property
    def paths(self) -> list[Path]:
        """Absolute paths to be seen by the build, without those below another one."""
        found: set[Path] = set()
        for word in " ".join(self.values.values()).split():
            path = Path(urlsplit(word).path if word.startswith("file:") else word)
            if path.is_absolute() and path.exists():
                # A folder index points to its packages beside it: ../../files/NAME.whl
                found.add(path.parent if word.startswith("file:") and path.is_dir() else path)
        return sorted(path for path in found if not found & set(path.parents))


def pip_settings() -> PipSettings:
    """This machine's effective pip settings, as `pip config list` shows them; none where there is no pip."""
    pip = [sys.executable, "-m", "pip"]
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ranks and key in PIP_SETTINGS and ranks[section] >= found.get(key, (0, ""))[0]:
            found[key] = ranks[section], " ".join(str(ast.literal_eval(value)).split())
    return PipSettings({key: value for key, (_, value) in sorted(found.items())})


class Engine:
    """One of docker, podman, buildah, by its own command line."""

    def __init__(self, name: str, options: list[str]) -> None:
        self.name, self._options = name, options

    def run(self, *words: str, quiet: bool = False) -> str:
        """The standard output of a command; ends this program with one line where it fails."""
        done = subprocess.run([self.name, *words], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
        if done.returncode and not quiet:
            sys.exit(f"images: `{self.name} {words[0]}` failed with exit code {done.returncode}; see its lines above")
        return done.stdout

    def build(self, dockerfile: str, tag: str, arguments: dict[str, str], settings: PipSettings) -> None:
        """Build `dockerfile` as `tag`."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items() if value]
        with self._reach(settings, arguments) as extra:
            cached = ["--layers"] if self.name == "buildah" else []
            words = ["build", *cached, *self._options, *given, *extra, "-f", dockerfile, "-t", tag, "."]
            done = subprocess.run([self.name, *words], stdout=sys.stderr, check=False, cwd=ROOT)
        if done.returncode:
            sys.exit(f"images: {tag} was not built (exit code {done.returncode}); the builder's lines above say why")

    @contextmanager
    def _reach(self, settings: PipSettings, arguments: dict[str, str]) -> Iterator[list[str]]:
        """Options through which the build stage sees this machine's pip settings."""
        if not settings.values:
            yield []
            return
        with tempfile.TemporaryDirectory() as scratch:
            configuration = Path(scratch) / "pip.conf"
            configuration.write_text(settings.text)
            if self.name != "docker":
                mounts = [(configuration, Path("/etc/pip.conf")), *((path, path) for path in settings.paths)]
                yield [f"--volume={here}:{there}:ro" for here, there in mounts]
                return
            # docker cannot mount into a build: a throw-away image stands in for the build stage's base
            lines = [f"FROM {_base(arguments)}", "COPY pip.conf /etc/pip.conf"]
            for number, path in enumerate(settings.paths):
                held = Path(scratch) / str(number)
                _ = shutil.copytree(path, held) if path.is_dir() else shutil.copyfile(path, held)
                lines.append(f"COPY {number} {path}{'/' if path.is_dir() else ''}")
            (Path(scratch) / "Dockerfile").write_text("\n".join([*lines, ""]))
            tag = f"localhost/wardround-build-{os.getpid()}"
            self.run("build", *self._options, "-q", "-t", tag, scratch)
            try:
                yield [f"--build-arg=BUILD_IMAGE={tag}"]
            finally:
                self.run("image", "rm", "-f", tag, quiet=True)

    def archive(self, tag: str, target: Path) -> None:
        """Write the image to a tar file in Docker's save format."""
        target.unlink(missing_ok=True)
        if self.name == "buildah":
            self.run("push", "-q", tag, f"docker-archive:{target}:{tag}")
        else:
            self.run("save", "-o", str(target), tag)


def _base(arguments: dict[str, str]) -> str:
    image = arguments["BASE_IMAGE"] or _default_base()
    return f"{image}@{arguments['BASE_DIGEST']}" if arguments["BASE_DIGEST"] else image


def _default_base() -> str:
    lines = (ROOT / IMAGES["keyshare"]).read_text().splitlines()
    return next(line for line in lines if line.startswith("ARG BASE_IMAGE=")).partition("=")[2]


def choose_engine(wanted: str | None, options: list[str]) -> Engine:
    """The wanted builder, or the first that works: a docker client without its daemon is none."""
    for name in [wanted] if wanted else ENGINES:
        asked = ["version", "--format", "{{.Server.Version}}"] if name == "docker" else ["--version"]
        if shutil.which(name) and subprocess.run([name, *asked], capture_output=True, check=False).returncode == 0:
            return Engine(name, options)
    missing = f"{wanted} does not answer" if wanted else "neither docker (with its daemon), podman nor buildah is here"
    sys.exit(f"images: {missing}: install one of them, for example with: apt-get install buildah")


def measure(archive: Path) -> tuple[int, int, bytes]:
    """(bytes over the base, bytes in all, SBOM) of an archive in Docker's save format."""
    over = whole = 0
    sbom = b""
    with tarfile.open(archive) as tar:
        for name in json.loads(_member(tar, "manifest.json"))[0]["Layers"]:
            file = tar.extractfile(name)
            with tarfile.open(fileobj=file) as layer:
                size = 0
                for member in layer:
                    size += member.size
                    if member.name.lstrip("./") == SBOM:
                        sbom = _member(layer, member.name)
            whole += size
            over += size if sbom else 0  # what lies below the first layer of ours is the base
    return over, whole, sbom


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    return file.read() if file is not None else b""


def main() -> None:
    """Build what the command line asks for; prints one line for each image."""
    parser = argparse.ArgumentParser(prog="deploy/images/build.py", description=__doc__)
    parser.add_argument("images", nargs="*", choices=[*IMAGES, []], help="which; default: all")
    parser.add_argument("--builder", choices=ENGINES, default=os.environ.get("BUILDER") or None)
    parser.add_argument("--repository", default=os.environ.get("REPOSITORY") or "localhost/wardround", metavar="PREFIX")
    parser.add_argument("--flavour", choices=("cpu", "cuda"), default=os.environ.get("FLAVOUR") or "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "build/images", help="folder for archives and SBOMs")
    chosen = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    engine = choose_engine(chosen.builder, shlex.split(os.environ.get("BUILD_OPTIONS", "")))
    settings = pip_settings()
    arguments = {name: os.environ.get(name, "") for name in ("BASE_IMAGE", "BASE_DIGEST")}
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.images or IMAGES:
        tag, more = f"{chosen.repository}/{name}:{version}", dict(arguments)
        if name == "hospital-node":
            tag += f"-{chosen.flavour}"
            more |= {"FLAVOUR": chosen.flavour, "TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL", "")}
        engine.build(IMAGES[name], tag, more, settings)
        archive = chosen.out / f"{tag.rpartition('/')[2].replace(':', '-')}.tar"
        engine.archive(tag, archive)
        over, whole, sbom = measure(archive)
        archive.with_suffix(".sbom.cdx.json").write_bytes(sbom)
        print(f"{tag}: {over / 1e6:.1f} MB over its base, {whole / 1e6:.1f} MB in all; {archive}", flush=True)


if __name__ == "__main__":
    main()
