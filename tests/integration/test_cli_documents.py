"""The way of a consortium by hand: keys, charter, signatures, pins, study, policies, a site that is ready."""

import hashlib
import json
import math
import re
import shutil
import stat
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from ruamel.yaml import YAML
from typer.testing import CliRunner

from services.cli.__main__ import app, main
from services.common.documents.charter import load_charter, load_signatures
from services.common.documents.costs import study_epsilon
from services.common.documents.pin import load_pin
from services.common.documents.policy import load_policy
from services.common.documents.shape import check_study
from services.common.documents.study import load_study
from services.common.documents.words import words_of
from services.common.ids import Role
from services.common.rpc.certificates import Identity, identity_of
from tests.support.sites import write_image

Run = Callable[..., str]
PODS = ("ash", "birch", "cedar", "elm")
HOSPITALS = ("alice", "bob", "carol")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed; its output."""

    def call(*words: object) -> str:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must be refused; its one line."""

    def call(*words: object, code: int = 1) -> str:
        assert main([str(word) for word in words]) == code
        error = capsys.readouterr().err
        assert error.startswith("wardround: ")
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites, a charter with a quorum of signatures, a study and its model; tests copy what they change."""
    folder = tmp_path_factory.mktemp("consortium")
    runner = CliRunner()

    def must(*words: object) -> None:
        result = runner.invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, (words, result.output, result.exception)

    for role, id in [("aggregator", "centre"), *(("pod", p) for p in PODS), *(("hospital", h) for h in HOSPITALS)]:
        must("site", "init", "--role", role, "--id", id, "--organisation", f"{id} trust", "--consortium", "lesions",
             "--out", folder / id)  # fmt: skip
    joins = [folder / id / "join.yaml" for id in ("centre", *PODS, *HOSPITALS)]
    must(
        "charter", "draft", *joins, "--consortium", "lesions", "--committee", "4,2,3", "--out", folder / "charter.yaml"
    )
    for pod in PODS[:3]:
        must("charter", "sign", folder / "charter.yaml", "--identity", folder / pod / "identity.pem")
    must("study", "draft", "--charter", folder / "charter.yaml", "--classes", "benign,malignant", "--image-size", "28",
         "--rounds", "4", "--steps", "2", "--patients", "100", "--out", folder / "study")  # fmt: skip
    return folder


def test_site_init_keeps_secrets_to_their_owner_and_overwrites_nothing(consortium: Path, refused: Run) -> None:
    for name in ("identity.pem", "tls-root-key.pem", "tls-key.pem", "secret.yaml"):
        assert stat.S_IMODE((consortium / "alice" / name).stat().st_mode) == 0o600
    before = {path: path.read_bytes() for path in (consortium / "alice").iterdir()}
    said = refused("site", "init", "--role", "hospital", "--id", "alice", "--organisation", "x", "--consortium",
                   "lesions", "--out", consortium / "alice")  # fmt: skip
    assert "exists and is not overwritten" in said
    assert {path: path.read_bytes() for path in (consortium / "alice").iterdir()} == before


def test_no_output_shows_a_secret(tmp_path: Path, run: Run) -> None:
    said = run("site", "init", "--role", "pod", "--id", "oak", "--organisation", "Oak", "--consortium", "c", "--out",
               tmp_path)  # fmt: skip
    secrets = "".join((tmp_path / name).read_text() for name in ("identity.pem", "tls-key.pem", "tls-root-key.pem"))
    for line in secrets.splitlines():
        assert line.startswith("-----") or line not in said
        assert line.startswith("-----") or line not in (tmp_path / "join.yaml").read_text()


def test_the_secret_for_the_cluster_holds_the_exact_keys_and_follows_a_renewal(tmp_path: Path, run: Run) -> None:
    run("site", "init", "--role", "hospital", "--id", "oak", "--organisation", "Oak", "--consortium", "c", "--out",
        tmp_path)  # fmt: skip
    for _ in range(2):
        manifest = YAML(typ="safe", pure=True).load((tmp_path / "secret.yaml").read_text())
        assert (manifest["kind"], manifest["metadata"]["name"]) == ("Secret", "wardround-oak")
        held = {key: b64decode(text) for key, text in manifest["data"].items()}
        assert held == {name: (tmp_path / name).read_bytes() for name in ("identity.pem", "tls.pem", "tls-key.pem")}
        assert stat.S_IMODE((tmp_path / "secret.yaml").stat().st_mode) == 0o600
        before = held["tls.pem"]
        said = run("site", "renew", tmp_path)
        assert all(text not in said for text in manifest["data"].values())
    assert (tmp_path / "tls.pem").read_bytes() != before


def test_the_values_for_the_chart_ask_for_what_only_the_site_knows(tmp_path: Path, run: Run) -> None:
    values = {}
    for role in ("hospital", "pod", "aggregator"):
        run("site", "init", "--role", role, "--id", role, "--organisation", role, "--consortium", "c", "--out",
            tmp_path / role, "--aggregator", "centre.example.org:443")  # fmt: skip
        text = (tmp_path / role / "site.yaml").read_text()
        assert "BEGIN" not in text
        values[role] = YAML(typ="safe", pure=True).load(text)
    dialled = {"id": "pod", "aggregator": "centre.example.org:443"}
    assert values["pod"] == {"config": dialled, "secretName": "wardround-pod"}
    assert values["aggregator"] == {"config": {"id": "aggregator"}, "secretName": "wardround-aggregator"}
    assert values["hospital"]["data"] == {"existingClaim": ""}


def test_operators_are_certified_by_the_centre_alone(tmp_path: Path, run: Run, refused: Run) -> None:
    for role in ("aggregator", "hospital"):
        run("site", "init", "--role", role, "--id", role, "--organisation", role, "--consortium", "c", "--out",
            tmp_path / role)  # fmt: skip
    said = run("site", "operator", tmp_path / "aggregator", "--name", "olga", "--out", tmp_path / "olga", "--days", 7)
    assert "for 7 days" in said
    assert stat.S_IMODE((tmp_path / "olga" / "operator-key.pem").stat().st_mode) == 0o600
    leaf = x509.load_pem_x509_certificate((tmp_path / "olga" / "operator.pem").read_bytes())
    assert identity_of(leaf) == Identity("c", Role.OPERATOR, "olga")
    words = ("site", "operator", tmp_path / "hospital", "--name", "olga", "--out", tmp_path / "other")
    assert "Unix socket" in refused(*words)


def test_p_26_only_the_right_words_write_a_pin(consortium: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    charter, pin = consortium / "charter.yaml", tmp_path / "pin.yaml"
    own = ("--me", "alice", "--join", consortium / "alice" / "join.yaml", "--pin", pin)
    loaded = load_charter(charter.read_bytes())
    words = " ".join(words_of(loaded.digest))
    shown = run("charter", "verify", charter, *own)
    assert words in shown
    assert loaded.digest.hex() in shown
    digits = re.sub(r"\s", "", shown)
    for pod in loaded.document.pods:
        assert pod.id in shown
    assert all(pod.identity_key[:8] in digits for pod in loaded.document.pods)
    told = json.loads(run("charter", "verify", charter, *own, "--json"))
    assert (told["words"], told["sha256"]) == (words, loaded.digest.hex())
    keys = {member["id"]: member["fingerprint"] for member in told["members"]}
    assert keys == {member.id: member.identity_key for _, member in loaded.members()}
    assert told["signed_by"] == sorted(PODS[:3])
    assert not pin.exists()
    wrong = " ".join(words_of(bytes(32)))
    assert "nothing is pinned" in refused("charter", "verify", charter, *own, "--confirm", wrong)
    assert not pin.exists()
    assert "pinned" in run("charter", "verify", charter, *own, "--confirm", words.upper())
    assert load_pin(pin.read_bytes()).current == loaded.digest.hex()


def test_p_26_a_drafter_who_changes_an_entry_is_noticed(consortium: Path, tmp_path: Path, refused: Run) -> None:
    """The drafter may write a key of its own with a valid self-signature; the site's own join file tells."""
    assert main(["site", "init", "--role", "hospital", "--id", "alice", "--organisation", "alice trust",
                 "--consortium", "lesions", "--out", str(tmp_path / "forged")]) == 0  # fmt: skip
    joins = [consortium / id / "join.yaml" for id in ("centre", *PODS, "bob", "carol")]
    charter = tmp_path / "charter.yaml"
    words = ["charter", "draft", *joins, tmp_path / "forged" / "join.yaml", "--consortium", "lesions", "--out", charter]
    assert main([str(word) for word in words]) == 0
    own = consortium / "alice" / "join.yaml"
    assert "somebody changed it" in refused("charter", "verify", charter, "--me", "alice", "--join", own)


def test_an_amendment_is_pinned_beside_the_charter_in_force(
    consortium: Path, tmp_path: Path, run: Run, refused: Run
) -> None:
    first, second, pin = consortium / "charter.yaml", tmp_path / "second.yaml", tmp_path / "pin.yaml"
    joins = [consortium / id / "join.yaml" for id in ("centre", *PODS, *HOSPITALS)]
    run("charter", "draft", *joins, "--consortium", "lesions", "--version", 2, "--out", second)
    own = ("--me", "elm", "--join", consortium / "elm" / "join.yaml", "--pin", pin)
    digests = [load_charter(path.read_bytes()).digest for path in (first, second)]
    spoken = [" ".join(words_of(digest)) for digest in digests]
    assert "pin the charter in force first" in refused(
        "charter", "verify", second, *own, "--confirm", spoken[1], "--as", "next"
    )
    run("charter", "verify", first, *own, "--confirm", spoken[0])
    assert "--as next" in refused("charter", "verify", second, *own, "--confirm", spoken[1])
    run("charter", "verify", second, *own, "--confirm", spoken[1], "--as", "next")
    held = load_pin(pin.read_bytes())
    assert (held.current, held.next) == (digests[0].hex(), digests[1].hex())
    run("charter", "verify", second, *own, "--confirm", spoken[1], "--as", "current")
    held = load_pin(pin.read_bytes())
    assert (held.current, held.next) == (digests[1].hex(), None)


def test_a_demo_charter_and_k_0_are_shown(consortium: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    joins = [consortium / id / "join.yaml" for id in ("centre", *PODS, *HOSPITALS)]
    charter = tmp_path / "charter.yaml"
    draft = ("charter", "draft", *joins, "--consortium", "lesions", "--out", charter, "--demo", "--minimum-cohort", 2)
    assert "say `two_hospitals: accepted`" in refused(*draft, "--colluding", 0)
    run(*draft, "--colluding", 0, "--two-hospitals-accepted")
    shown = run("charter", "verify", charter, "--me", "bob", "--join", consortium / "bob" / "join.yaml")
    assert "DEMO" in shown
    assert "each of two hospitals can read the other's vector" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--committee", "4,2,2"), "lets two cohorts be certified"),
        (("--committee", "4,1,3"), "below 2"),
        (("--committee", "5,3,4"), "needs 5 pods, the join files hold 4"),
        (("--committee", "4-2-3"), "write pods,threshold,quorum"),
        (("--minimum-cohort", "2"), "at least 3 is needed"),
        (("--consortium", "other"), "joins lesions, this charter is for other"),
    ],
)
def test_an_unsafe_charter_is_not_even_written(
    consortium: Path, tmp_path: Path, refused: Run, changes: tuple[str, ...], words: str
) -> None:
    """P-1, P-12 at the drafter's desk."""
    joins = [consortium / id / "join.yaml" for id in ("centre", *PODS, *HOSPITALS)]
    options = {"--consortium": "lesions", "--out": str(tmp_path / "charter.yaml")}
    options.update(dict([changes]))
    assert words in refused("charter", "draft", *joins, *[part for pair in options.items() for part in pair])
    assert not (tmp_path / "charter.yaml").exists()


def test_a_quorum_of_pod_owners_signs_the_exact_bytes(consortium: Path, refused: Run) -> None:
    charter = load_charter((consortium / "charter.yaml").read_bytes())
    signed = load_signatures((consortium / "charter.signatures.yaml").read_bytes(), charter)
    assert signed == PODS[:3]
    assert "only pods' owners sign" in refused(
        "charter", "sign", consortium / "charter.yaml", "--identity", consortium / "alice" / "identity.pem"
    )
    assert "not an unencrypted Ed25519 key" in refused(
        "charter", "sign", consortium / "charter.yaml", "--identity", consortium / "ash" / "tls-key.pem"
    )


def test_a_shared_study_is_drafted_with_its_claim_in_full(consortium: Path, tmp_path: Path, run: Run) -> None:
    """A claim names (ε, δ, adjacency, unit, n_min, k, ε_solo); what is drafted passes its own check."""
    said = run(
        "study", "draft", "--charter", consortium / "charter.yaml", "--classes", "benign,malignant", "--rounds", "8",
        "--image-size", "28", "--mechanism", "shared", "--patients", "300", "--out", tmp_path,
    )  # fmt: skip
    study = load_study((tmp_path / "study.yaml").read_bytes()).document
    assert study.privacy.steps_per_round == 1
    assert study.privacy.expected_batch == study.privacy.sampling_rate * 300 * len(study.privacy.patients)
    assert (study.server.strategy, study.training.learning_rate) == ("sgd", None)
    solo = max(study_epsilon(study, solo=True).values())
    assert f"ε_solo = {math.ceil(100 * solo) / 100:.2f}" in said
    assert "at most k = 1 of them collude" in said
    shown = run("study", "check", tmp_path / "study.yaml", "--charter", consortium / "charter.yaml")
    assert "patients of a hospital in one step surely never meet the data bound" in shown
    assert "ε of a training patient over the rounds" in shown


def test_a_drafted_study_names_its_strategy(consortium: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    options = ("--charter", consortium / "charter.yaml", "--classes", "benign,malignant", "--image-size", "28")
    said = run("study", "draft", *options, "--strategy", "fedyogi", "--out", tmp_path)
    study = load_study((tmp_path / "study.yaml").read_bytes()).document
    assert study.server.strategy == "fedyogi"
    assert "strategy: FedYogi (learning rate 0.1, momentum 0.9, second moment 0.99, adaptivity 0.001)" in said
    words = refused(
        "study", "draft", *options, "--strategy", "fedyogi", "--mechanism", "shared", "--out", tmp_path / "other"
    )
    assert "shared sends sums of gradients: choose sgd or adam" in words
    assert not (tmp_path / "other" / "study.yaml").exists()


def test_a_drafted_study_stands_and_its_cost_is_told(consortium: Path, tmp_path: Path, run: Run) -> None:
    charter = load_charter((consortium / "charter.yaml").read_bytes())
    study = load_study((consortium / "study" / "study.yaml").read_bytes())
    check_study(charter, study)
    model = (consortium / "study" / "v0.safetensors").read_bytes()
    header = int.from_bytes(model[:8], "little")
    assert (len(model) - 8 - header) // 4 == study.document.model.parameters
    found = json.loads(
        run("study", "check", consortium / "study" / "study.yaml", "--charter", consortium / "charter.yaml", "--json")
    )
    assert found["sha256"] == study.digest.hex()
    assert 7.8 < found["epsilon"] <= found["claim"]["epsilon"] == 8.0
    assert set(found["splits"]) == {"train", "validation", "test"}
    assert found["splits"]["train"]["planned"] < found["splits"]["train"]["with_spare_rounds"]
    lanes = 4 + 1 + study.document.model.parameters
    boxes = 4 * (1120 + 3 * 32 + 16)  # a hybrid box for each pod: encapsulation, its three seeds, tag
    assert found["upload_bytes"]["train"] == 4 * lanes + boxes
    assert found["accountants"]["PRV"] == pytest.approx(found["accountants"]["PLD"], rel=5e-3)
    assert found["accountants"]["RDP"] > max(found["accountants"]["PLD"], found["accountants"]["PRV"])
    picture = tmp_path / "epsilon.png"
    text = run(
        "study", "check", consortium / "study" / "study.yaml", "--charter", consortium / "charter.yaml",
        "--picture", picture,
    )  # fmt: skip
    assert "claimed: ε = 8 at δ = 1e-05 for one patient" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_false_claim_is_refused_in_one_line(consortium: Path, tmp_path: Path, refused: Run) -> None:
    blob = (consortium / "study" / "study.yaml").read_bytes()
    (tmp_path / "study.yaml").write_bytes(blob.replace(b"  epsilon: 8.0", b"  epsilon: 2.0"))
    said = refused("study", "check", tmp_path / "study.yaml", "--charter", consortium / "charter.yaml")
    assert "claims 2, but its parameters give 7.9" in said or "claims 2, but its parameters give 8.0" in said


def test_a_study_may_begin_with_a_model_file(consortium: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    given = consortium / "study" / "v0.safetensors"
    words = ("study", "draft", "--charter", consortium / "charter.yaml", "--image-size", "28", "--seed", "9", "--start")
    run(*words, given, "--classes", "benign,malignant", "--out", tmp_path / "study")
    assert (tmp_path / "study" / "v0.safetensors").read_bytes() == given.read_bytes()
    drafted = load_study((tmp_path / "study" / "study.yaml").read_bytes()).document
    assert drafted.model.initial == hashlib.sha256(given.read_bytes()).hexdigest()
    said = refused(*words, given, "--classes", "a,b,c", "--out", tmp_path / "other")
    assert "holds other tensors than this architecture's" in said


def test_a_policy_for_one_study_allows_it_and_nothing_else(
    consortium: Path, tmp_path: Path, run: Run, refused: Run
) -> None:
    study, charter, policy = consortium / "study" / "study.yaml", consortium / "charter.yaml", tmp_path / "policy.yaml"
    run("policy", "draft", "--study", study, "--charter", charter, "--hospital", "alice", "--out", policy)
    assert load_policy(policy.read_bytes()).document.hospital == "alice"
    assert "allows all 4 rounds" in run("policy", "check", policy, "--study", study, "--charter", charter)
    told = json.loads(run("policy", "check", policy, "--study", study, "--charter", charter, "--json"))
    assert told["allowed"] is True
    assert 0 < told["epsilon"] <= told["dataset_epsilon_cap"]
    other = tmp_path / "study.yaml"
    other.write_bytes(study.read_bytes() + b"# one more byte\n")
    assert "is not listed" in refused("policy", "check", policy, "--study", other, "--charter", charter)
    tight = policy.read_bytes().replace(b"dataset_epsilon: 8.0", b"dataset_epsilon: 4.0")
    (tmp_path / "tight.yaml").write_bytes(tight)
    assert "the cap is 4" in refused("policy", "check", tmp_path / "tight.yaml", "--study", study, "--charter", charter)
    # Half of dataset_delta is the sum's: with no more than the study's own δ only the Rényi filter is left (L-2).
    small = policy.read_bytes().replace(b"dataset_delta: 2e-05", b"dataset_delta: 1e-05")
    (tmp_path / "small.yaml").write_bytes(small)
    assert "raise `dataset_delta` to 2e-05" in refused(
        "policy", "check", tmp_path / "small.yaml", "--study", study, "--charter", charter
    )


def make_config(consortium: Path, folder: Path) -> Path:
    """A hospital's configuration with everything beside it."""
    shutil.copytree(consortium / "alice", folder / "keys")
    for mode in ("identity.pem", "tls-key.pem"):
        (folder / "keys" / mode).chmod(0o600)
    charter, study = consortium / "charter.yaml", consortium / "study" / "study.yaml"
    words = " ".join(words_of(load_charter(charter.read_bytes()).digest))
    steps = [
        ["charter", "verify", charter, "--me", "alice", "--join", folder / "keys" / "join.yaml", "--pin",
         folder / "pin.yaml", "--confirm", words],
        ["policy", "draft", "--study", study, "--charter", charter, "--hospital", "alice", "--out",
         folder / "policy.yaml"],
    ]  # fmt: skip
    for step in steps:
        assert main([str(word) for word in step]) == 0
    write_image(folder / "data" / "a.png", 50)
    (folder / "data" / "metadata.csv").write_text("image_id,path,patient_id,label\na,a.png,p1,benign\n")
    config = folder / "hospital.yaml"
    config.write_text(
        f"id: alice\ncharters: [{charter}, {folder}/next.yaml]\npins: {folder}/pin.yaml\n"
        f"identity_key: {folder}/keys/identity.pem\n"
        f"tls: {{certificate: {folder}/keys/tls.pem, key: {folder}/keys/tls-key.pem}}\nstate: {folder}/state\n"
        f'aggregator: "127.0.0.1:1"\nadmin_socket: {folder}/admin.sock\npolicy: {folder}/policy.yaml\n'
        f"data: {folder}/data\n"
    )
    return config


def test_site_check_of_a_ready_hospital(consortium: Path, tmp_path: Path, run: Run) -> None:
    config = make_config(consortium, tmp_path)
    said = run("site", "check", "--config", config)
    assert "ready to start" in said
    assert "FAILED" not in said
    assert "warning" not in said
    told = json.loads(run("site", "check", "--config", config, "--json"))
    assert told["ready"] is True
    assert {check["state"] for check in told["checks"]} == {"passed"}


def test_site_check_names_what_is_wrong(consortium: Path, tmp_path: Path, refused: Run) -> None:
    config = make_config(consortium, tmp_path)
    text = config.read_text()
    for old, new, words in [
        (f"identity_key: {tmp_path}/keys", f"identity_key: {consortium}/bob", "is not the key of alice in the charter"),
        (f"certificate: {tmp_path}/keys", f"certificate: {consortium}/bob", "the key is not that of the certificate"),
        (f"state: {tmp_path}/state", "state: /proc/nowhere", "state folder must be writable"),
        (f"data: {tmp_path}/data", f"data: {tmp_path}/none", "metadata.csv"),
        (f"policy: {tmp_path}/policy.yaml", f"policy: {tmp_path}/none.yaml", "cannot be read"),
        ("id: alice", "id: bob", "is not the key of bob in the charter"),
        ("id: alice", "id: elm", "elm is a pod in the charter"),
        ("id: alice", "id: zoe", "zoe is not listed"),
        (f"pins: {tmp_path}/pin.yaml", f"pins: {tmp_path}/policy.yaml", "pin/v1 is needed"),
        ("id: alice", "id: alice\nthread: 4", "the key thread is unknown; the nearest is threads"),
    ]:
        assert old in text
        config.write_text(text.replace(old, new))
        assert words in refused("site", "check", "--config", config), (old, new)


def test_site_check_sees_a_certificate_that_ends_soon(
    consortium: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(consortium, tmp_path)
    from services.cli import site

    now = site.SystemClock().now_ms()

    class Later:
        def __init__(self, days: float) -> None:
            self.days = days

        def now_ms(self) -> int:
            return now + int(self.days * 86_400_000)

    monkeypatch.setattr(site, "SystemClock", lambda: Later(70))
    assert "site renew" in run("site", "check", "--config", config)
    monkeypatch.setattr(site, "SystemClock", lambda: Later(91))
    assert main(["site", "check", "--config", str(config)]) == 1
    run("site", "renew", tmp_path / "keys")
    assert "ready to start" in run("site", "check", "--config", config)


def test_wrong_usage_is_one_line_with_the_help_to_ask_for(refused: Run) -> None:
    assert "wardround site init --help" in refused("site", "init", "--role", "nurse", code=2)
    assert "--config" in refused("site", "check", code=2)
    assert "No such command" in refused("studdy", code=2)
