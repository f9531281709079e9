"""The model passport (markdown and JSON) and the picture of the learning curve, from a run's evidence."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from services.cli.claim import claim, claim_in_words
from services.cli.curve import draw_learning, learning_points
from services.cli.run import Run
from services.cli.temperature import temperature
from services.common.documents.costs import final_noise
from services.common.documents.strategies import strategy_in_words
from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import OUTCOME_ACCEPTED
from services.hospital_node.events import Checked
from services.hospital_node.ledger import parse_export
from services.hospital_node.spending import Account

SPLITS = ("train", "validation", "test")


def passport(run: Run, units: dict[str, str]) -> dict[str, Any]:
    """Everything a reader of the model should know, as plain values.

    `units`: by hospital, the word for what its privacy unit really is: patient, lesion or image.
    """
    study, charter = run.study.document, run.charter.document
    last = run.rounds[-1]
    rounds = [
        {
            "round": one.number,
            "verdict": one.released["verdict"],
            "reason": one.released["reason"],
            "cohort": one.released["cohort"],
            "certificate_sha256": one.result.certificate.hex(),
            "model_version": one.result.version,
            "model_sha256": one.result.model.hex(),
            "released_of_the_start_model": one.figures,
        }
        for one in run.rounds
    ]
    return {
        "study": {
            "name": study.name,
            "sha256": run.study.digest.hex(),
            "purpose": study.purpose,
            "synthetic_data": study.synthetic,
            "architecture": study.model.architecture,
            "classes": list(study.model.classes),
            "image_size": study.model.image_size,
            "backbone": None if study.model.backbone is None else study.model.backbone.model_dump(),
            "parameters": study.model.parameters,
            "strategy": strategy_in_words(study),
        },
        "charter": {
            "sha256": run.charter.digest.hex(),
            "demo": charter.demo,
            "committee": [len(charter.pods), charter.committee.threshold, charter.committee.quorum],
            "minimum_cohort": study.cohort.minimum,
            "colluding_hospitals": study.cohort.colluding_hospitals,
            "two_hospitals_accepted": charter.cohort.colluding_hospitals == 0,
        },
        "privacy": {
            "mechanism": study.privacy.mechanism,
            "unit": " or ".join(sorted(set(units.values()))),
            "unit_by_site": units,
            "adjacency": "add or remove one unit of one hospital",
            "claim": claim(study),
            "delta": study.privacy.delta,
            "epsilon_by_site_and_split": _by_site(run, solo=False),
            "epsilon_solo_by_site_and_split": _by_site(run, solo=True),
        },
        "data": {
            "check_required": study.data.require_check,
            "checked_by_site": _checked_by_site(run),
        },
        "model": {
            "version": last.result.version,
            "sha256": last.result.model.hex(),
            "lineage": [
                study.model.initial,
                *(one.result.model.hex() for one in run.rounds if _made_model(run, one.number)),
            ],
        },
        "calibration": {
            "temperature": _temperature(run),
            "from": "the final evaluation's score histograms, noise included",
        },
        "final_evaluation": last.figures if last.released["kind"] == "final" else {},
        "rounds": rounds,
        "no_medical_device": "Trained to show a federation at work. Not a medical device.",
    }


def _temperature(run: Run) -> float | None:
    """From the last result's histograms; None where it released none."""
    study, sums = run.study.document, run.rounds[-1].released.get("sums", {})
    if "histogram" not in sums:
        return None
    noise = 0.0
    if study.privacy.mechanism != "none":
        own = final_noise(study)
        noise = math.sqrt(run.rounds[-1].released["cohort"]) * own.scale / 2.0**own.fraction_bits
    return temperature(sums["histogram"], len(study.model.classes), noise)


def site_epsilon(ledger: Path, study: str, solo: bool = False) -> dict[str, float | None]:
    """ε (or ε_solo) of one study (hex) by split, from the exported ledger; None where it is not bounded."""
    account = Account(entry.parsed() for entry in parse_export(ledger.read_text().splitlines()))
    return {
        split: round_up(value, 4) if math.isfinite(value) else None
        for split, value in account.splits(study, solo).items()
    }


def _by_site(run: Run, *, solo: bool) -> dict[str, dict[str, float | None]]:
    digest = run.study.digest.hex()
    return {folder.name: site_epsilon(folder / "ledger.jsonl", digest, solo) for folder in _hospitals(run)}


def _checked_by_site(run: Run) -> dict[str, list[str]]:
    """By hospital, the keyed digests (hex) of the data that passed their check, in the order of the ledger."""
    found = {}
    for folder in _hospitals(run):
        entries = parse_export((folder / "ledger.jsonl").read_text().splitlines())
        events = (entry.parsed() for entry in entries)
        ours = run.study.digest.hex()
        found[folder.name] = [event.data for event in events if isinstance(event, Checked) and event.study == ours]
    return found


def shown_epsilon(splits: dict[str, float | None], split: str, digits: int) -> str:
    """One cell of a table: rounded up, "not bounded", or "–" where nothing of the split was released."""
    value = splits.get(split, 0.0)
    if value is None:
        return "not bounded"
    return f"{round_up(value, digits):.{digits}f}" if value else "–"


def shown_with_solo(splits: dict[str, float | None], solo: dict[str, float | None], split: str, digits: int) -> str:
    """The same with ε_solo in brackets: what holds if all the others collude or fail."""
    found = shown_epsilon(splits, split, digits)
    return f"{found} ({shown_epsilon(solo, split, digits)})" if splits.get(split) else found


def round_up(value: float, digits: int) -> float:
    """Never below `value`: an ε that is shown is one that the accounting proves."""
    return math.ceil(value * float(10**digits)) / float(10**digits)


def write_passport(run: Run, folder: Path, units: dict[str, str]) -> dict[str, Any]:
    """passport.json, passport.md and learning-curve.png in `folder`, and model.safetensors of the last version."""
    content = passport(run, units)
    source = run.model(content["model"]["version"])
    if hashlib.sha256(source.read_bytes()).hexdigest() != content["model"]["sha256"]:
        raise ServiceError(Reason.BAD_DIGEST, f"{source.name} is not the model that the last result names")
    (folder / "model.safetensors").write_bytes(source.read_bytes())
    (folder / "passport.json").write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
    (folder / "passport.md").write_text(markdown(content))
    draw_curve(run, folder / "learning-curve.png")
    return content


def markdown(content: dict[str, Any]) -> str:
    """The passport for people."""
    study, privacy, charter = content["study"], content["privacy"], content["charter"]
    lines = [f"# Model passport: {study['name']}, v{content['model']['version']}", ""]
    if study["synthetic_data"]:
        lines += ["**Synthetic data: drawn, not photographed.**", ""]
    if charter["demo"]:
        lines += ["**Demo charter: one person owned every site; nothing here protects anybody.**", ""]
    if charter["two_hospitals_accepted"]:
        lines += ["**k = 0: each of two hospitals can read the other's update together with the aggregator.**", ""]
    lines += [
        f"- model: {study['architecture']}, {study['parameters']:,} parameters, SHA-256 `{content['model']['sha256']}`",
        f"- study: `{study['sha256']}`; charter: `{charter['sha256']}`",
        f"- purpose: {study['purpose']}",
        f"- classes: {', '.join(study['classes'])}",
        f"- strategy: {study['strategy']}",
        f"- cohort: at least {charter['minimum_cohort']} hospitals, k = {charter['colluding_hospitals']}; "
        f"committee (m, t, q) = {tuple(charter['committee'])}",
        f"- {content['no_medical_device']}",
        "",
        "## Privacy",
        "",
        f"Mechanism `{privacy['mechanism']}`; unit: {privacy['unit']}; adjacency: {privacy['adjacency']}. "
        f"Claimed: {claim_in_words(privacy['claim'], privacy['unit'])}.",
        "",
        "Spent, with ε_solo in brackets: what a site's own noise gives its patients if all the others collude or fail.",
        "",
        "| site | ε train | ε validation | ε test |",
        "|---|---|---|---|",
    ]
    for site, splits in privacy["epsilon_by_site_and_split"].items():
        solo = privacy["epsilon_solo_by_site_and_split"][site]
        cells = [shown_with_solo(splits, solo, split, 3) for split in SPLITS]
        lines.append(f"| {site} | {' | '.join(cells)} |")
    if content["data"]["check_required"]:
        lines += ["", "## Data", "", "Each site's images had to pass `wardround data check`, and be the same since."]
        lines += ["", "| site | verdict | digest of the data, under the site's secret key |", "|---|---|---|"]
        for site, digests in content["data"]["checked_by_site"].items():
            shown = ", then ".join(f"`{digest[:16]}…`" for digest in digests)
            lines.append(f"| {site} | {'passed' if digests else 'nothing sent'} | {shown} |")
    lines += [
        "",
        "## Rounds",
        "",
        "| round | verdict | cohort | model | released | certificate |",
        "|---|---|---|---|---|---|",
    ]
    for one in content["rounds"]:
        figures = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in one["released_of_the_start_model"].items())
        lines.append(
            f"| {one['round']} | {one['verdict']} {one['reason']} | {one['cohort']} | v{one['model_version']} | "
            f"{figures} | `{one['certificate_sha256'][:16]}…` |"
        )
    return "\n".join(lines) + "\n"


def draw_curve(run: Run, path: Path) -> None:
    """Released quality of each model version, noise included, as a PNG."""
    points, version = [], 0
    for one in run.rounds:
        points.append((version, one.figures))
        version = one.result.version
    note = "synthetic data" if run.study.document.synthetic else "real images"
    draw_learning(learning_points(points), run.study.document, note, path)


def _hospitals(run: Run) -> list[Path]:
    return sorted(path for path in (run.evidence / "hospitals").glob("*") if path.is_dir())


def _made_model(run: Run, number: int) -> bool:
    one = next(one for one in run.rounds if one.number == number)
    return one.result.outcome == OUTCOME_ACCEPTED and one.released["kind"] == "train"
