"""privacy.md L-4, end to end: real pods find a real hospital whose ledger was restored from a backup, at Offer.

Rounds here stall (P-25): what counts is what the pods answer to the hospital's signed header.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.ledger import verify_source
from services.cli.ledger_source import open_source
from services.common.documents.study import load_study
from services.common.errors import Reason
from services.common.secagg import blob as codec
from services.common.secagg.certificate import check_manifest
from services.common.secagg.messages import AbandonCertificate, AcceptList
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import World, make_world
from tests.support.pods import FakeClock, PodWorld

D = 4096


class Story:
    """A hospital and four pods; `round_of` is one attempt up to the pods' accept lists."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.pods = PodWorld(folder / "pods", world.consortium)
        self.aggregator = FakeAggregator(world)
        address = self.aggregator.start()
        self.site = Site(world, self.aggregator, folder / "alice", address)
        self.site.clock = FakeClock()
        self.site.reopen()

    def close(self) -> None:
        self.site.close()
        self.aggregator.stop()
        self.pods.close()

    def round_of(self, number: int, attempt: int = 1) -> list[str]:
        """ "" for each pod that accepts alice's header, else why not."""
        self.aggregator.open_round(number)
        manifest = self.pods.propose(self.aggregator.core(number), attempt, self.aggregator.abandons)
        checked = check_manifest(manifest, self.world.charter.roster)
        endorsements = [self.pods.pods[index].endorse(manifest) for index in checked.commitments]
        self.aggregator.offer(checked, endorsements)
        self.site.step()
        arrived = self.aggregator.submissions()[-1]
        answers = []
        for index in checked.commitments:
            signed, refused = self.pods.pods[index].offer(
                manifest, lambda index=index: [(arrived.header, arrived.boxes[index])]
            )
            accepted = [member.hospital for member in codec.decode(AcceptList, signed.blob).accepted]
            assert accepted == ([] if refused else ["alice"])
            answers.append(dict(refused).get("alice", ""))
        return answers

    def backup(self, place: Path) -> None:
        self.site.close()
        shutil.copytree(self.site.folder / "state", place)
        self.site.open()

    def restore(self, place: Path) -> None:
        """As an operator would: the whole volume, consistent in itself. Nothing at the hospital can tell."""
        self.site.close()
        shutil.rmtree(self.site.folder / "state")
        shutil.copytree(place, self.site.folder / "state")
        verify_source(open_source(self.site.folder / "state"))
        self.site.open()


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    made = Story(make_world(tmp_path / "world", D, rounds=5), tmp_path)
    assert made.round_of(1) == [""] * 4
    made.backup(tmp_path / "backup")
    assert made.round_of(2) == [""] * 4
    yield made
    made.close()


def all_say(answers: list[str], words: str) -> bool:
    return all(answer.startswith(Reason.ROLLED_BACK.value) and words in answer for answer in answers)


def test_l4_ledger_that_goes_on_is_accepted(story: Story) -> None:
    story.site.reopen()  # a restart is no rollback
    assert story.round_of(3) == [""] * 4


def test_l4_restored_ledger_is_refused_in_the_next_round(story: Story, tmp_path: Path) -> None:
    """The round's debit takes a number below the highest that the pods saw in this study."""
    story.restore(tmp_path / "backup")
    assert all_say(story.round_of(3), "below one seen in this study")


def test_l4_restored_ledger_is_refused_in_the_same_round(story: Story, tmp_path: Path) -> None:
    """The hospital has forgotten that it sent a vector of round 2, and draws another: same number, another head."""
    story.restore(tmp_path / "backup")
    first = next(iter(story.aggregator.manifests.values()))
    for index in (0, 1, 2):
        story.pods.restart(index)
    given_up = [story.pods.pods[index].abandon(story.world.charter.digest, first.ref, first.M) for index in range(3)]
    story.aggregator.abandons = [codec.encode(AbandonCertificate(tuple(given_up)))]
    assert all_say(story.round_of(2, 2), "seen with another head")


def test_l4_restored_ledger_is_refused_in_another_study(story: Story, tmp_path: Path) -> None:
    """Pods remember heads across studies: the fourth event was another one."""
    story.restore(tmp_path / "backup")
    other = load_study(story.world.study.blob + b"\n")
    policy = story.world.policy_blob().replace(story.world.study.digest.hex().encode(), other.digest.hex().encode())
    (story.site.folder / "policy.yaml").write_bytes(policy)
    story.aggregator.studies[other.digest] = other.blob
    story.aggregator.world.study = other
    story.aggregator.publish(study=other.digest)
    assert all_say(story.round_of(1), "seen with another head")


def test_l4_a_pod_that_restarts_remembers(story: Story, tmp_path: Path) -> None:
    story.restore(tmp_path / "backup")
    for index in range(4):
        story.pods.restart(index)
    assert all_say(story.round_of(3), "below one seen in this study")
