"""What the images must not hold, and how large they may be.

$WARDROUND_IMAGES names a folder with the archives of `make images`; without it they are built.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.charts import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        "WARDROUND_IMAGES" not in os.environ and not any(map(shutil.which, ("docker", "podman", "buildah"))),
        reason="no docker, podman or buildah, and $WARDROUND_IMAGES names no archives",
    ),
]
IMAGES = ("aggregator", "cli", "hospital-node", "keyshare")
COMPILERS = {"cc", "gcc", "g++", "c++", "clang", "ld", "make", "rustc", "go"}
OURS = "opt/wardround/"


@dataclass(frozen=True)
class Image:
    """An archive's configuration and the files of the layers that are ours."""

    config: dict[str, Any]
    files: dict[str, int]
    base: set[str]
    sbom: dict[str, Any]

    @property
    def packages(self) -> set[str]:
        """Installed distributions, without what one of them carries inside itself."""
        metadata = [name.partition("/site-packages/")[2].split("/") for name in self.files]
        found = [name[0] for name in metadata if len(name) == 2 and name[1] == "METADATA"]
        return {name.partition("-")[0].lower() for name in found}


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("WARDROUND_IMAGES"):
        return Path(given)
    folder = tmp_path_factory.mktemp("images")
    done = subprocess.run(
        [sys.executable, "deploy/images/build.py", "--out", str(folder)], cwd=ROOT, capture_output=True, check=False
    )
    if b"pull" in done.stderr and b"initializing source" in done.stderr:
        pytest.skip("the base image can neither be found nor pulled: set BASE_IMAGE")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return folder


@pytest.fixture(scope="session", params=IMAGES)
def image(request: pytest.FixtureRequest, archives: Path) -> tuple[str, Image]:
    found = sorted(archives.glob(f"{request.param}-*.tar"))
    assert found, f"no archive of {request.param} in {archives}"
    return request.param, read(found[0])


def read(archive: Path) -> Image:
    ours: dict[str, int] = {}
    base: set[str] = set()
    sbom: dict[str, Any] = {}
    with tarfile.open(archive) as tar:

        def member(name: str) -> Any:
            file = tar.extractfile(name)
            assert file is not None
            return file

        manifest = json.load(member("manifest.json"))[0]
        for name in manifest["Layers"]:
            with tarfile.open(fileobj=member(name)) as layer:
                held = {}
                for entry in layer:
                    path = entry.name.removeprefix("./").lstrip("/")
                    held[path] = entry.size
                    if path == f"{OURS}sbom.cdx.json":
                        sbom = json.load(layer.extractfile(entry))  # type: ignore[arg-type]  # a plain file, by its name
            if ours or any(path.startswith(OURS) for path in held):
                ours |= held
            else:
                base |= held.keys()
        return Image(json.load(member(manifest["Config"])), ours, base, sbom)


def test_an_image_holds_only_what_its_service_imports(image: tuple[str, Image]) -> None:
    name, held = image
    assert ("torch" in held.packages) is (name == "hospital-node")
    unneeded = {"pip", "wheel", "pytest", "grpcio_tools", "cyclonedx_bom"}
    unneeded |= set() if name == "hospital-node" else {"setuptools"}  # torch requires it
    assert not held.packages & unneeded
    services = {path.split("/services/")[1].split("/")[0] for path in held.files if "/site-packages/services/" in path}
    roles = services & {"aggregator", "keyshare", "hospital_node", "cli"}
    if name == "cli":
        assert roles == {"aggregator", "keyshare", "hospital_node", "cli"}
    else:
        assert roles == {name.replace("-", "_")}
    assert [path for path in held.files if path.endswith("_pb2_grpc.py")]


def test_an_image_adds_no_compiler_no_tests_and_no_settings_of_the_builder(image: tuple[str, Image]) -> None:
    _, held = image
    assert not [path for path in held.files if "/site-packages/" in path and {"tests", "test"} & set(path.split("/"))]
    assert not [path for path in held.files if path.split("/")[-1] in COMPILERS and "/bin/" in path]
    outside = [path for path, size in held.files.items() if not path.startswith(OURS) and size]
    assert not outside, "only the service's own folder is laid over the base"
    environment = {entry.partition("=")[0] for entry in held.config["config"]["Env"]}
    assert not {name for name in environment if name.startswith(("PIP_", "HTTP", "http", "TORCH"))}


def test_an_image_runs_as_a_number_with_an_entry_point(image: tuple[str, Image]) -> None:
    name, held = image
    user = held.config["config"]["User"].split(":")[0]
    assert user.isdecimal()
    assert int(user) > 0
    entry = held.config["config"]["Entrypoint"]
    assert entry == (["wardround"] if name == "cli" else ["python", "-m", f"services.{name.replace('-', '_')}"])


def test_an_sbom_names_every_distribution(image: tuple[str, Image]) -> None:
    _, held = image
    assert held.sbom["bomFormat"] == "CycloneDX"
    named = {component["name"].lower().replace("-", "_") for component in held.sbom["components"]}
    named.add("wardround")  # the SBOM's subject
    assert {package.replace(".", "_") for package in held.packages} <= {name.replace(".", "_") for name in named}


def test_the_keyshare_image_is_small_and_readable(archives: Path) -> None:
    held = read(sorted(archives.glob("keyshare-*.tar"))[0])
    assert sum(held.files.values()) <= 120_000_000
    assert not [path for path in held.files if path.endswith(".pyc")]
    assert not {path.split("/")[-1] for path in held.base if path.startswith(("usr/bin/", "bin/"))} & COMPILERS
