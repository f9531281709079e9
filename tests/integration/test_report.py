"""The study report of a small real run: what it says, and that it says so when the evidence does not hold."""

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.cli import browser
from services.cli.__main__ import REFUSED, main
from services.cli.report import write_report
from services.cli.report_content import gather
from services.cli.run import load_run, write_sums
from services.cli.spent import spent_by_round
from services.hospital_node.ledger import parse_export
from services.hospital_node.spending import Account
from tests.support.evidence import CONFUSION, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    assert main(["report", str(run)]) == 0
    return Page(run / "report.html")


def test_the_report_says_what_it_must(run: Path, page: Page) -> None:
    study = load_run(run).study
    for words in (
        "evidence verifies",
        "The images were synthetic",
        "not a medical device",
        "Unit: one patient",
        "add or remove one unit of one hospital",
        "ε = 8 at δ = 1e-05 for one patient",
        study.digest.hex(),
        "Expected calibration error",
        "a perfectly calibrated model would show about",
        "signatures verified",
    ):
        assert words in page.text, words
    for name in ("alice", "bob", "carol", "dave"):
        assert name in page.text
    assert "3 of 4" in page.text
    assert "dave (did not submit)" in page.text


def test_every_certificate_and_model_digest_is_on_the_page(run: Path, page: Page) -> None:
    for one in load_run(run).rounds:
        assert one.result.certificate.hex() in page.text
        assert one.result.model.hex() in page.text


def test_the_page_can_be_read_without_seeing_it_and_asks_for_nothing(page: Page) -> None:
    assert [attrs["lang"] for tag, attrs in page.tags if tag == "html"] == ["en"]
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) == 5
    assert page.source.count("<desc>") == len(pictures)
    assert all(attrs.get("aria-hidden") or attrs.get("role") for tag, attrs in page.tags if tag == "svg")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "form", "base")]
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onclick", "onload"} & attrs.keys()]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_figures_have_intervals_and_the_truth_is_inside(run: Path) -> None:
    content = gather(run)
    shares = [row[i] / sum(row) for i, row in enumerate(CONFUSION)]
    (balanced,) = [one for one in content.figures if (one.name, one.split) == ("balanced_accuracy", "test")]
    assert balanced.interval is not None
    assert balanced.interval.low < sum(shares) / 2 < balanced.interval.high
    assert [(version, split) for version, split, _ in content.models] == [
        (0, "validation"),
        (1, "validation"),
        (2, "test"),
    ]
    assert content.calibration is not None
    assert content.calibration.floor > 0
    assert content.solo is None


def test_epsilon_by_round_ends_with_what_the_ledger_says(run: Path) -> None:
    spent = spent_by_round(load_run(run))
    study = load_run(run).study.digest.hex()
    assert {(one.site, one.split) for one in spent} == {
        (site, split) for site in ("alice", "bob", "carol", "dave") for split in ("train", "validation", "test")
    }
    for one in spent:
        ledger = run / "evidence" / "hospitals" / one.site / "ledger.jsonl"
        account = Account(entry.parsed() for entry in parse_export(ledger.read_text().splitlines()))
        assert one.total == account.splits(study)[one.split]
        assert [value for _, value in one.after] == sorted(value for _, value in one.after)
    rounds = {(one.site, one.split): [number for number, _ in one.after] for one in spent}
    assert rounds["alice", "train"] == [1, 2]
    assert rounds["dave", "train"] == [2]
    assert rounds["dave", "test"] == [3]


def test_a_run_that_does_not_verify_gets_a_page_that_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    receipt = next((copy / "evidence").rglob("receipt-*.signed"))
    blob = receipt.read_bytes()
    receipt.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))  # the top byte of a signature is 0 one time in sixteen
    write_sums(copy / "evidence")
    assert main(["report", str(copy), "--out", str(copy / "bad.html")]) == REFUSED
    assert "does not verify, and the page says so" in capsys.readouterr().err
    text = Page(copy / "bad.html").text
    assert "evidence does NOT verify" in text
    assert "Do not use this run" in text
    assert "The check stopped at: round 1" in text


def test_what_the_evidence_says_is_text_and_never_markup(run: Path, tmp_path: Path) -> None:
    """A purpose that a study's author wrote must not become part of the page."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    study = copy / "evidence" / "aggregator" / "study.yaml"
    study.write_text(
        study.read_text().replace("A small study that the tests run.", "A <script>alert(1)</script> study.")
    )
    assert not write_report(copy, copy / "report.html")
    assert "<script>" not in (copy / "report.html").read_text()


def test_a_folder_without_evidence_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == REFUSED
    assert "holds no evidence of a run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_pdf_without_a_browser_says_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert browser.find() is None
    assert main(["report", str(run), "--pdf"]) == REFUSED
    assert "install it, or open" in capsys.readouterr().err
