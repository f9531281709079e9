"""A service that must not start says one sentence that names the thing and the next step, and ends with code 2."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from services.common.clock import SystemClock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.last_words import refused
from services.common.store.chain import ChainedLog
from services.common.store.database import files, open_database
from services.common.store.events import SCHEMA
from services.hospital_node.__main__ import open_trainer
from services.hospital_node.config import load_config
from services.hospital_node.dataset import check_folder
from services.hospital_node.store import Store
from tests.support import aggregator_world
from tests.support.fake_aggregator_for_pods import FakeAggregator, PodProcess
from tests.support.hospital_world import World, make_world
from tests.support.sites import write_image, write_table

ROOT = Path(__file__).parents[2]
NOBODY = 65534
_DAY = 86_400_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), parameters=100)


def hospital(world: World, folder: Path, images: int = 2) -> Path:
    """The config of a hospital whose data folder is `folder`/data."""
    config = world.write_site(folder, "127.0.0.1:1")
    data = folder / "data"
    data.mkdir()
    for number in range(images):
        write_image(data / f"{number}.png", 10 * number)
    write_table(data, [(f"i{number}", f"{number}.png", f"p{number}", "nevus") for number in range(images)])
    config.write_text(config.read_text().replace(f'"data": "{folder}"', f'"data": "{data}"'))
    return config


def last_words(module: str, config: Path, before: str = "") -> str:
    """Start it; the one line that it ended with."""
    command = f"{before}exec {sys.executable} -m {module} --config {config}"
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    ended = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    return line


def expire(world: World, folder: Path) -> None:
    leaf = world.tls.issue(Role.HOSPITAL, "alice", days=1, now_ms=SystemClock().now_ms() - 3 * _DAY, name="expired")
    config = folder / "config.yaml"
    fresh = world.tls.leaf(Role.HOSPITAL, "alice")
    text = config.read_text().replace(str(fresh.certificate), str(leaf.certificate))
    config.write_text(text.replace(str(fresh.key), str(leaf.key)))


def replace(old: str, new: str) -> Callable[[World, Path], None]:
    def change(world: World, folder: Path) -> None:
        text = (folder / "config.yaml").read_text()
        assert old in text
        (folder / "config.yaml").write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda world, folder: (folder / "identity.pem").unlink(), ["identity.pem", "check the path"]),
        (replace('"id": "alice"', '"id": "erin"'), ["charter.yaml", "no hospital 'erin'", "join.yaml"]),
        (expire, ["expired.crt", "valid from", "renew it"]),
        (lambda world, folder: (folder / "data" / "metadata.csv").unlink(), ["metadata.csv", "`data` must name"]),
        (lambda world, folder: (folder / "data" / "0.png").unlink(), ["0.png", "missing", "remove the row"]),
    ],
    ids=["no key", "not in the charter", "expired", "empty data", "no image"],
)
def test_a_hospital_says_what_is_wrong(
    world: World, tmp_path: Path, damage: Callable[[World, Path], None], words: list[str]
) -> None:
    config = hospital(world, tmp_path)
    damage(world, tmp_path)
    line = last_words("services.hospital_node", config)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("module", ["hospital_node", "keyshare", "aggregator"])
def test_a_full_volume_is_said_in_one_line(world: World, tmp_path: Path, module: str) -> None:
    """The limit on a file's size stands for the full disk: the first byte of the store cannot be written."""
    config = write_config(world, tmp_path, module)
    line = last_words(f"services.{module}", config, before="ulimit -f 0; ")
    assert "free or enlarge the volume" in line
    assert str(tmp_path) in line


STORES = {"hospital_node": "hospital.sqlite", "keyshare": "custody.sqlite", "aggregator": "aggregator.db"}
ROLES = pytest.mark.parametrize("module", list(STORES))


def store_of(world: World, folder: Path, module: str) -> tuple[Path, Path]:
    """(config, the path of the store) of a service, whose state folder is made."""
    config = write_config(world, folder, module)
    found = YAML(typ="safe").load(config.read_text())["state"]
    path = (config.parent / found) / STORES[module]
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in files(path):
        old.unlink()
    return config, path


@ROLES
def test_a_store_of_an_earlier_build_is_refused_in_one_line(world: World, tmp_path: Path, module: str) -> None:
    config, path = store_of(world, tmp_path, module)
    schema = "CREATE TABLE submissions (y BLOB)" if module == "hospital_node" else "CREATE TABLE events (stream TEXT)"
    connection = sqlite3.connect(path)
    connection.executescript(f"{schema}; PRAGMA user_version=1")
    connection.close()
    line = last_words(f"services.{module}", config)
    assert str(path) in line
    assert "before the first release" in line
    assert "begin with an empty one (docs/operations.md" in line


def test_an_event_of_another_build_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    """The tables are the same, what a pod wrote in them is not."""
    config, path = store_of(world, tmp_path, "keyshare")
    database = open_database(path, [SCHEMA], demo=True)
    ChainedLog(database, "custody").append([("Vanished", {})])
    database.close()
    line = last_words("services.keyshare", config)
    assert "event 'Vanished' is not known here" in line
    assert "begin with an empty one (docs/operations.md" in line


@ROLES
def test_a_store_that_is_open_elsewhere_is_refused_in_one_line(world: World, tmp_path: Path, module: str) -> None:
    config, path = store_of(world, tmp_path, module)
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    line = last_words(f"services.{module}", config)
    connection.close()
    assert f"{path} is open in another program" in line
    assert "close that one first" in line


@ROLES
def test_a_damaged_store_is_refused_in_one_line(world: World, tmp_path: Path, module: str) -> None:
    config, path = store_of(world, tmp_path, module)
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE t (x); PRAGMA user_version=1")
    connection.close()
    path.write_bytes(path.read_bytes()[:100] + bytes(4000))  # a good header, then nothing
    line = last_words(f"services.{module}", config)
    assert f"{path} is damaged" in line
    assert "see the runbook" in line


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_store_that_may_only_be_read_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    Store(tmp_path / "state").close()
    for place in (tmp_path / "state", tmp_path / "state" / "vectors"):
        place.chmod(0o777)
    (tmp_path / "state" / f"{STORES['hospital_node']}.lock").chmod(0o666)
    (tmp_path / "state" / STORES["hospital_node"]).chmod(0o444)
    sentence = as_nobody(lambda: Store(tmp_path / "state"))
    assert "Permission denied" in sentence
    assert f"let user {NOBODY} write there" in sentence


def write_config(world: World, folder: Path, module: str) -> Path:
    if module == "hospital_node":
        return hospital(world, folder)
    if module == "aggregator":
        return aggregator_world.make_world(folder / "centre").write_config()
    made = PodProcess(FakeAggregator(folder))
    made.spawn().kill()
    assert made.process is not None
    made.process.wait()
    return made.file


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_data_that_this_user_may_not_read_is_named(tmp_path: Path) -> None:
    """In a child, so that this process stays root."""
    write_image(tmp_path / "0.png", 10)
    write_table(tmp_path, [("i0", "0.png", "p0", "nevus")])
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    assert check_folder(tmp_path) == 1, "and Pillow has loaded what the child may not read"
    for hidden, words in (("metadata.csv", "metadata.csv cannot be read"), ("0.png", "0.png cannot be read")):
        (tmp_path / hidden).chmod(0o600)
        sentence = as_nobody(lambda: check_folder(tmp_path))
        assert words in sentence, sentence
        assert f"user {NOBODY}" in sentence
        (tmp_path / hidden).chmod(0o644)
    assert as_nobody(lambda: check_folder(tmp_path)) == "nothing is wrong"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_state_folder_of_another_user_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    sentence = as_nobody(lambda: Store(tmp_path / "state"))
    assert str(tmp_path / "state") in sentence
    assert f"let user {NOBODY} write there" in sentence
    assert "fsGroup" in sentence


def as_nobody(work: Callable[[], object]) -> str:
    """What `work` refuses in a child process of another user."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            os.write(write, b"nothing is wrong")
        except ServiceError as error:
            os.write(write, error.detail.encode())
        except Exception as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        return said.read()


def test_a_gpu_that_is_not_there_is_refused_before_the_loop(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(hospital(world, tmp_path)).model_copy(update={"device": "cuda"})
    with pytest.raises(ServiceError, match="no GPU here: set device to cpu") as caught:
        open_trainer(config)
    assert caught.value.reason is Reason.NOT_FOUND


def test_the_sentence_is_the_termination_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "termination-log"
    error = ServiceError(Reason.INVALID_DOCUMENT, "keys/identity.pem is\nmissing: " + "ä" * 4000)
    assert refused("hospital node", error, message) == 2
    assert not message.exists(), "only the kubelet makes it"
    message.write_text("an older and much longer message")
    assert refused("hospital node", error, message) == 2
    said = message.read_bytes()
    assert said.startswith(b"hospital node: keys/identity.pem is missing: ")
    assert len(said) == 4096, "the kubelet reads no more"
    assert capsys.readouterr().err.count("\n") == 2
    message.unlink()
    message.mkdir()
    assert refused("hospital node", error, message) == 2, "what is not ours to write does not matter"
