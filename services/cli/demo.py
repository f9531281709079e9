"""`wardround demo`: a whole federation of real processes over mTLS on this machine, several secure rounds.

Lays out the sites (federation.py), starts them, shows what happens, collects the evidence, writes model and passport.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.cli import demo_study, federation, passport, report, synthetic
from services.cli.claim import claim_in_words
from services.cli.data_check import check_folder
from services.cli.drafts import suited_backbone, unwritten_model, write_initial
from services.cli.evidence import administration, collect, place, status
from services.cli.federation import Federation
from services.cli.live import SiteView, Snapshot, View, snapshot_of
from services.cli.processes import Service, stop_all, wait_for_file
from services.cli.run import load_run, write_sums
from services.cli.study import Mechanism, ServerStrategy
from services.common.documents.study import BackboneSection, CohortSection
from services.common.errors import Reason, ServiceError
from services.common.ids import Role, check_id
from services.common.store.durable import replace_file
from services.hospital_node.datacheck import RECORD
from wardround.admin.v1 import admin_pb2

_NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy")
_MARKER = "demo.json"


@dataclass
class Running:
    """The processes of a federation and where the aggregator listens."""

    federation: Federation
    address: str
    services: dict[str, Service]

    def check(self, expected_dead: set[str]) -> None:
        """Raise UNREACHABLE with the last words of a process that ended by itself."""
        for name, service in self.services.items():
            if not service.running and name not in expected_dead:
                raise ServiceError(
                    Reason.UNREACHABLE, f"{name} ended by itself; its log {service.log} says:\n{service.last_words()}"
                )


def demo(  # what a person may choose; each has a default that works
    output: Annotated[
        Path, typer.Option(help="folder for everything this run makes; an older run there is replaced")
    ] = Path("build/demo"),
    data: Annotated[
        Path | None,
        typer.Option(help="folder with one folder per site (metadata.csv and images); else synthetic images"),
    ] = None,
    hospitals: Annotated[int, typer.Option(min=2, max=10, help="how many, with synthetic images")] = 4,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="training rounds; one evaluation follows; default: 4, under shared as tuned"
        ),
    ] = None,
    committee: Annotated[str, typer.Option(help="pods and threshold: 4,2 or 5,3 or 3,3 or 7,3")] = "4,2",
    cohort: Annotated[
        str | None,
        typer.Option(help="smallest cohort and hospitals that may collude; default: 3,1, larger under shared"),
    ] = None,
    mechanism: Annotated[
        Mechanism, typer.Option(help="local: DP-SGD at each hospital; shared: one noise for all; none: no protection")
    ] = Mechanism.local,
    strategy: Annotated[
        ServerStrategy | None,
        typer.Option(help="the server step (docs/strategies.md); default: fedavg, and sgd under shared"),
    ] = None,
    epsilon: Annotated[float, typer.Option(min=0.01, help="ε of the whole study, evaluations included")] = 8.0,
    model: Annotated[str, typer.Option(help="small-cnn, resnet18-gn, linear-head or centred-head")] = "small-cnn",
    image_size: Annotated[int | None, typer.Option(help="pixels of a side; default: tuned for the model")] = None,
    backbone: Annotated[Path | None, typer.Option(help="weights file of EfficientNet-Lite0, for the two heads")] = None,
    kill_one: Annotated[
        bool, typer.Option("--kill-one", help="kill a hospital and a pod in round 2 on purpose")
    ] = False,
    minutes: Annotated[float, typer.Option(help="give up after so long")] = 240,
) -> None:
    """Run a whole federation on this machine: real processes, mTLS, masks, noise, ledgers.

    Example: wardround demo --rounds 3 --kill-one
    """
    console = Console()
    started = time.monotonic()
    shared = mechanism is Mechanism.shared
    pods, threshold = _pair(committee, "--committee", "pods and threshold, such as 5,3")
    rounds = rounds or (demo_study.settings_of(model, synthetic=data is None).shared_rounds if shared else 4)
    _claim_folder(output)
    if data is None:
        console.print(f"Drawing synthetic images for {hospitals} hospitals …")
    folders = _data(output, data, hospitals)
    console.print("Making keys, charter, first model and study; finding the noise that its ε asks for …")
    laid = lay_out(
        output,
        folders,
        pods,
        threshold,
        model,
        mechanism.value,
        rounds,
        epsilon,
        image_size,
        backbone,
        synthetic_data=data is None,
        quick_deadline=kill_one,
        cohort=None if cohort is None else _pair(cohort, "--cohort", "smallest cohort and colluding, such as 3,1"),
        strategy=None if strategy is None else strategy.value,
    )
    what = "synthetic images" if data is None else f"real images from {data}"
    title = f"Wardround demo · {len(folders)} hospitals, {pods} key-share pods · {what}"
    console.print(f"Starting {len(laid.sites)} processes; their logs are in {output / 'logs'}", highlight=False)
    running = start(laid)
    try:
        with View(console, title) as view:
            _watch(running, view, rounds + 1, kill_one, started + 60 * minutes)
        gather(running)
    finally:
        stop_all(list(running.services.values()))
    run = load_run(output)
    content = passport.write_passport(run, output, {name: _unit(folder) for name, folder in folders.items()})
    report.write_report(output, output / "report.html")
    _summary(console, content, output, time.monotonic() - started)


def lay_out(
    output: Path,
    folders: dict[str, Path],
    pods: int,
    threshold: int,
    model: str,
    mechanism: str,
    rounds: int,
    epsilon: float,
    image_size: int | None,
    backbone: Path | None,
    *,
    synthetic_data: bool,
    quick_deadline: bool = False,
    cohort: tuple[int, int] | None = None,
    strategy: str | None = None,
) -> Federation:
    """All files of a federation: sites, charter, v0, study, policies, configs.

    `quick_deadline`: a round waits 25 s for the missing, not longer. `cohort`: (n_min, k); None: one hospital may be
    missing under `shared`, three are enough else, and one may collude. `strategy` None: what suits the mechanism.
    Raises INVALID_DOCUMENT and the like.
    """
    settings = demo_study.settings_of(model, synthetic=synthetic_data)
    if quick_deadline:
        settings = replace(settings, submit_seconds=25)
    weights = _backbone(output, backbone, model) if backbone is not None else None
    classes = synthetic.CLASSES if synthetic_data else _classes(folders)
    wanted = unwritten_model(model, image_size or settings.image_size, classes, weights)
    section = write_initial(wanted, output / "v0.safetensors", seed=1)
    sites = federation.make_sites(output, list(folders), pods)
    enough = max(3, len(folders) - 1) if mechanism == "shared" else 3
    minimum, colluding = cohort or (min(enough, len(folders)), min(1, len(folders) - 2))
    charter = federation.write_charter(output, sites, federation.committee_of(pods, threshold), minimum, colluding)
    study = demo_study.draft(
        synthetic=synthetic_data,
        model=section,
        settings=settings,
        mechanism=mechanism,
        rounds=rounds,
        epsilon=epsilon,
        delta=1e-5,
        patients={name: max(10, int(0.07 * _patients(folder)) * 10) for name, folder in folders.items()},
        cohort=CohortSection(minimum=minimum, colluding_hospitals=colluding),
        strategy=strategy,
    )
    laid = federation.write_study(output, sites, charter, study)
    federation.write_configs(laid, folders, through_round=rounds + 1, threads=1)
    return laid


def _backbone(output: Path, weights: Path, model: str) -> BackboneSection:
    """The weights file where every hospital of this machine finds it, named by its SHA-256."""
    if not weights.is_file():
        raise ServiceError(Reason.NOT_FOUND, f"--backbone {weights} is not a file: give EfficientNet-Lite0's weights")
    (output / "backbones").mkdir(parents=True, exist_ok=True)
    target = output / "backbones" / weights.name
    shutil.copyfile(weights, target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return suited_backbone(model, digest)


def start(laid: Federation) -> Running:
    """Start the aggregator, learn where it listens, then start everybody else."""
    services = {site.id: federation.service(laid, site) for site in laid.sites}
    centre = services[laid.aggregator.id]
    centre.start()
    try:
        address = wait_for_file(laid.aggregator.state / "listen.address", centre, 60)
        federation.set_aggregator_address(laid, address)
        for service in services.values():
            if service is not centre:
                service.start()
    except BaseException:
        stop_all(list(services.values()))
        raise
    return Running(laid, address, services)


def gather(running: Running) -> None:
    """Collect every site's evidence under RUN/evidence, and list its digests."""
    laid = running.federation
    for site in laid.sites:
        if running.services[site.id].running:
            with administration(laid, site, running.address) as stub:
                collect(stub, place(laid.root, site.role, site.id))
    write_sums(laid.root / "evidence")


def _watch(running: Running, view: View, rounds: int, kill_one: bool, until: float) -> None:
    """Show the federation until its study is finished; kill and restart two processes where asked."""
    laid, dead = running.federation, set[str]()
    victims = [laid.of(Role.HOSPITAL)[-1].id, laid.of(Role.POD)[-1].id]
    killed = False
    with administration(laid, laid.aggregator, running.address) as centre:
        while time.monotonic() < until:
            running.check(dead)
            now = status(centre)
            if now is not None:
                view.show(_snapshot(running, now, rounds, dead))
                if now.finished:
                    return
                if kill_one and not killed and now.round == 2:
                    killed, dead = True, set(victims)
                    for name in victims:
                        running.services[name].kill()
                    view.say(f"killed {' and '.join(victims)} (kill -9) in the middle of round 2")
                elif dead and now.round > 2:
                    for name in victims:
                        running.services[name].start()
                    view.say(f"round 2 ended without them; restarted {' and '.join(victims)}")
                    dead = set()
            time.sleep(0.25)  # the screen's rhythm; nothing else waits for it
    raise ServiceError(
        Reason.UNREACHABLE,
        f"the study did not end in time; the logs in {laid.root / 'logs'} say why, --minutes gives more",
    )


def _snapshot(running: Running, now: admin_pb2.Status, rounds: int, dead: set[str]) -> Snapshot:
    views = []
    for site in running.federation.sites:
        if site.role == Role.AGGREGATOR:
            continue
        found = None
        if site.id not in dead and site.socket.exists():
            with administration(running.federation, site, "") as stub:
                found = status(stub)
        phase = "killed" if site.id in dead else found.phase if found is not None else "starting"
        figures = dict(found.figures) if found is not None else {}
        spent, left, solo = (figures.get(f"epsilon_{name}") for name in ("spent", "left", "solo"))
        views.append(SiteView(site.id, site.role.value, phase, spent, left, solo))
    return snapshot_of(now, tuple(views), rounds)


def _summary(console: Console, content: dict[str, Any], output: Path, seconds: float) -> None:
    table = Table(title=f"{content['study']['name']}: {len(content['rounds'])} rounds in {seconds:.0f} s")
    for column in ("round", "verdict", "cohort", "model", "released figures of the model it started from"):
        table.add_column(column)
    for one in content["rounds"]:
        figures = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in one["released_of_the_start_model"].items())
        table.add_row(str(one["round"]), one["verdict"], str(one["cohort"]), f"v{one['model_version']}", figures)
    console.print(table)
    unit = content["privacy"]["unit"]
    spent = Table(title=f"ε (ε_solo) spent at δ = {content['privacy']['delta']}; each {unit} is in one split only")
    if content["privacy"]["mechanism"] == "none":
        spent = Table(title="no noise was added: ε is not bounded, only sums were hidden")
    for column in ("hospital", "unit", *passport.SPLITS):
        spent.add_column(column)
    for site, splits in content["privacy"]["epsilon_by_site_and_split"].items():
        solo = content["privacy"]["epsilon_solo_by_site_and_split"][site]
        cells = [passport.shown_with_solo(splits, solo, split, 2) for split in passport.SPLITS]
        spent.add_row(site, content["privacy"]["unit_by_site"][site], *cells)
    console.print(spent)
    console.print(f"Claimed: {claim_in_words(content['privacy']['claim'], unit)}.", highlight=False)
    if content["study"]["synthetic_data"]:
        console.print("The images were synthetic: drawn, not photographed.")
    console.print(f"Model, passport and learning curve: {output}", highlight=False)
    # As it can be typed here: the command of a virtual environment that nobody activated is not on the path.
    own = Path(sys.executable).with_name("wardround")
    command = "wardround" if shutil.which("wardround") or not own.exists() else os.path.relpath(own)
    console.print(
        f"Read it: {output / 'report.html'}\nCheck it: {command} verify {output}", highlight=False, soft_wrap=True
    )


def _pair(text: str, option: str, wanted: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ServiceError(Reason.INVALID_DOCUMENT, f"{option} {text!r}: give {wanted}")
    return int(parts[0]), int(parts[1])


def _claim_folder(output: Path) -> None:
    """An empty folder, or one that an older demo made; anything else is not ours to delete."""
    if output.exists() and any(output.iterdir()):
        if not (output / _MARKER).exists():
            raise ServiceError(
                Reason.CONFLICT, f"{output} holds something that is not a demo run: give another --output, or empty it"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).write_text(json.dumps({"made_by": "wardround demo"}) + "\n")


def check_drawn(folders: Mapping[str, Path]) -> None:
    """Look through drawn images, as the demo's study requires of every site (`data.require_check`)."""
    for folder in folders.values():
        replace_file(folder / RECORD, [check_folder(folder, synthetic.CLASSES).record().encode()])


def _data(output: Path, data: Path | None, hospitals: int) -> dict[str, Path]:
    """Data folders by hospital id; `_` in a folder's name becomes `-` in the id."""
    if data is None:
        names = _NAMES[:hospitals]
        synthetic.write_sites(output / "data", names)
        folders = {name: output / "data" / name for name in names}
        check_drawn(folders)
        return folders
    if not data.is_dir():
        raise ServiceError(Reason.NOT_FOUND, f"{data} is not a folder: give one that holds a folder for each site")
    found = {path.name: path.resolve() for path in sorted(data.iterdir()) if (path / "metadata.csv").exists()}
    if len(found) < 2:
        raise ServiceError(
            Reason.INVALID_DATA, f"{data} has {len(found)} folders with a metadata.csv, at least 2 are needed"
        )
    return {check_id(name.lower().replace("_", "-"), "site folder"): path for name, path in found.items()}


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _classes(folders: dict[str, Path]) -> tuple[str, ...]:
    labels = {row.get("dx") or row.get("label") or "" for folder in folders.values() for row in _rows(folder)}
    return tuple(sorted(labels - {""}))


def _unit(folder: Path) -> str:
    """The word that really exists at this site (privacy.md §1)."""
    from services.hospital_node.dataset import UNITS

    columns = _rows(folder)[0]
    return next((unit for column, unit in UNITS if columns.get(column)), "image")


def _patients(folder: Path) -> int:
    rows = _rows(folder)
    return len({row.get("patient_id") or row.get("lesion_id") or row.get("image_id") for row in rows})
