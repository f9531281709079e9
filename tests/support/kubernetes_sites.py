"""A consortium as ten organisations would make it, by the `wardround` command alone; only the clocks are impatient."""

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.cli import synthetic
from services.cli.__main__ import main
from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.emit import emit
from services.common.documents.policy import load_policy
from services.common.documents.study import LoadedStudy, TimingSection, load_study
from services.common.documents.words import words_of
from services.common.ids import Role

CENTRE = "centre"
PODS = ("ash", "birch", "cedar", "elm", "fir")
HOSPITALS = ("alice", "bob", "carol", "dave")
IMAGE_SIZE = 16
PATIENTS = 40


def role_of(site: str) -> Role:
    return Role.AGGREGATOR if site == CENTRE else Role.POD if site in PODS else Role.HOSPITAL


def wardround(*words: object) -> None:
    """The command, which must succeed."""
    assert main([str(word) for word in words]) == 0, words


@dataclass
class Consortium:
    """`folder`/SITE is what that organisation holds; charters and studies lie in `folder` itself."""

    folder: Path
    address: str
    version: int = 1  # of the charter that every site has pinned as current
    announced: set[str] = field(default_factory=set)  # sites that hold the one after it, too

    @property
    def sites(self) -> tuple[str, ...]:
        return (CENTRE, *PODS, *HOSPITALS)

    def charter(self, version: int = 1) -> Path:
        return self.folder / f"charter-{version}.yaml"

    def signatures(self, version: int = 1) -> Path:
        return self.folder / f"charter-{version}.signatures.yaml"

    def loaded(self, version: int = 1) -> LoadedCharter:
        return load_charter(self.charter(version).read_bytes())

    def study(self, name: str) -> LoadedStudy:
        return load_study(self.path(name).read_bytes())

    def path(self, name: str) -> Path:
        return self.folder / name / "study.yaml"

    def init(self) -> None:
        """Every organisation makes its keys; the centre also a certificate for its operator."""
        for site in self.sites:
            wardround("site", "init", "--role", role_of(site).value, "--id", site, "--organisation", f"{site} inc.",
                      "--consortium", "wards", "--out", self.folder / site, "--aggregator", self.address)  # fmt: skip
        wardround("site", "operator", self.folder / CENTRE, "--name", "olga", "--out", self.folder / "olga")

    def agree(self, version: int, maximum: int) -> None:
        """A charter, signed by all pods' owners."""
        charter, signatures = self.charter(version), self.signatures(version)
        joins = [self.folder / site / "join.yaml" for site in self.sites]
        wardround("charter", "draft", *joins, "--consortium", "wards", "--committee", "5,3,4", "--minimum-cohort", 3,
                  "--maximum-cohort", maximum, "--version", version, "--out", charter)  # fmt: skip
        for pod in PODS:
            identity = self.folder / pod / "identity.pem"
            wardround("charter", "sign", charter, "--identity", identity, "--signatures", signatures)

    def pin(self, site: str, version: int, as_: str) -> None:
        """The site compares the twelve words, and pins."""
        words = " ".join(words_of(self.loaded(version).digest))
        folder = self.folder / site
        wardround("charter", "verify", self.charter(version), "--me", site, "--join", folder / "join.yaml",
                  "--confirm", words, "--pin", folder / "pin.yaml", "--as", as_,
                  "--signatures", self.signatures(version))  # fmt: skip

    def draft_study(self, name: str, rounds: int, train_seconds: float, seed: int = 1) -> None:
        """A study under differential privacy whose rounds take seconds, not hours."""
        out = self.folder / name
        wardround("study", "draft", "--charter", self.charter(), "--out", out, "--classes",
                  ",".join(synthetic.CLASSES), "--name", name, "--image-size", IMAGE_SIZE, "--rounds", rounds,
                  "--epsilon", 8, "--patients", PATIENTS, "--sampling-rate", 1, "--steps", 2,
                  "--seed", seed)  # fmt: skip
        document = self.study(name).document
        timing = TimingSection(train_seconds=train_seconds, submit_seconds=90, attempt_seconds=300)
        blob = emit(document.model_copy(update={"timing": timing, "synthetic": True}))
        self.path(name).write_bytes(blob)
        wardround("study", "check", self.path(name), "--charter", self.charter())

    def consent(self, *studies: str) -> None:
        """Every hospital's policy allows exactly these studies."""
        for hospital in HOSPITALS:
            path = self.folder / hospital / "policy.yaml"
            path.unlink(missing_ok=True)
            drafts = []
            for name in studies:
                draft = self.folder / hospital / f"policy-{name}.yaml"
                draft.unlink(missing_ok=True)
                wardround("policy", "draft", "--study", self.path(name), "--charter", self.charter(),
                          "--hospital", hospital, "--out", draft)  # fmt: skip
                drafts.append(load_policy(draft.read_bytes()).document)
            entries = tuple(entry for draft in drafts for entry in draft.studies)
            caps = {"dataset_epsilon": 100.0, "dataset_delta": sum(draft.dataset_delta for draft in drafts)}
            path.write_bytes(emit(drafts[0].model_copy(update={"studies": entries, **caps})))

    def images(self, hospital: str) -> bytes:
        """A tar of one hospital's synthetic images and metadata.csv."""
        folder = self.folder / "images" / hospital
        number = HOSPITALS.index(hospital)
        synthetic.write_site(folder, synthetic.CAMERAS[number % len(synthetic.CAMERAS)], PATIENTS, IMAGE_SIZE, number)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        return out.getvalue()

    def values(self, site: str, **more: Any) -> Path:
        """What the site adds to the site.yaml that `site init` wrote: small machines, one cluster for all."""
        cpu, memory = {Role.AGGREGATOR: ("250m", "768Mi"), Role.POD: ("60m", "192Mi"), Role.HOSPITAL: ("150m", "1Gi")}[
            role_of(site)
        ]
        found: dict[str, Any] = {
            "resources": {"cpu": cpu, "memory": memory, "ephemeralStorage": "64Mi"},
            "cli": {"resources": {"cpu": "250m", "memory": "512Mi", "ephemeralStorage": "64Mi"}},
            "state": {"size": "1Gi"},
            "metrics": {"from": [{"namespaceSelector": {"matchLabels": {"wardround.test/scraper": "yes"}}}]},
        }
        if role_of(site) is not Role.AGGREGATOR:
            found["networkPolicy"] = {"aggregator": {"namespace": f"wr-{CENTRE}"}}
        if role_of(site) is Role.HOSPITAL:
            found["data"] = {"existingClaim": "images"}
        path = self.folder / site / "cluster.yaml"
        path.write_text(json.dumps(found | more))
        return path

    def files(self, site: str, study: str = "first") -> list[str]:
        """Helm's options for one site: its values and the exact bytes of its documents."""
        folder = self.folder / site
        given = {"charter": self.charter(self.version), "pin": folder / "pin.yaml"}
        if site in self.announced:
            given["charterNext"] = self.charter(self.version + 1)
        if site == CENTRE:
            given |= {"charterSignatures": self.signatures(self.version), "plan.study": self.path(study)}
        if site in HOSPITALS:
            given["policy"] = folder / "policy.yaml"
        words = ["-f", str(folder / "site.yaml"), "-f", str(self.values(site))]
        return [*words, *(word for key, path in given.items() for word in ("--set-file", f"{key}={path}"))]
