"""A hospital keeps the charters that it once pinned: only for results of the rounds that ran under them."""

from pathlib import Path

import pytest

from services.common.documents.charter import load_charter
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.errors import ServiceError
from services.hospital_node.config import SiteDocuments, load_config
from tests.support.hospital_world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world", parameters=100)


def test_a_charter_that_was_pinned_is_followed_and_no_other(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "alice"
    config = load_config(world.write_site(folder, "127.0.0.1:1"))
    first, second = world.charter, load_charter(emit(world.charter.document.model_copy(update={"version": 9})))
    assert set(SiteDocuments(config).held_charters()) == {first.digest}

    (folder / "charter.yaml").write_bytes(second.blob)
    with pytest.raises(ServiceError, match="is not among the charter files"):
        SiteDocuments(config).held_charters()
    (folder / "pin.yaml").write_bytes(emit(Pin(wardround="pin/v1", current=second.digest.hex())))
    documents = SiteDocuments(config)
    assert set(documents.charters()) == {second.digest}, "rounds open under the pinned one alone"
    assert set(documents.held_charters()) == {first.digest, second.digest}

    third = load_charter(emit(world.charter.document.model_copy(update={"version": 10})))
    (folder / "charter.yaml").write_bytes(third.blob)
    (folder / "pin.yaml").write_bytes(emit(Pin(wardround="pin/v1", current=third.digest.hex())))
    assert set(documents.held_charters()) == {first.digest, second.digest, third.digest}, "in the same life, too"
