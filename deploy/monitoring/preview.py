"""`python -m deploy.monitoring.preview`: pictures of the three dashboards, from a real federation under Prometheus.

Runs `recording.recorded` (or draws an earlier one again, with --recording), asks Prometheus every panel's queries,
writes a page for each dashboard, and takes its picture with headless Chromium where that is installed.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from deploy.monitoring import draw
from deploy.monitoring.build import HELM
from deploy.monitoring.evaluate import Window, evaluate, load
from deploy.monitoring.prometheus import Prometheus
from deploy.monitoring.recording import recorded
from services.cli import browser

_NOTE = (
    "Every figure from a real Prometheus over a real run of four hospitals and four pods on synthetic images; "
    "drawn by deploy/monitoring/preview.py, not by Grafana."
)
_STILL = (
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
    "--run-all-compositor-stages-before-draw",  # else a busy machine gives half a picture
)


def pages(prometheus: Prometheus, window: Window, jobs: dict[str, str], folder: Path) -> list[Path]:
    """One page a dashboard; `jobs`: its name to the value of its variable `job`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path in sorted(HELM.glob("*/files/dashboards/*.json")):
        dashboard = load(path)
        shown = evaluate(dashboard, prometheus, jobs[path.stem], window)
        made.append(folder / f"{path.stem}.html")
        made[-1].write_text(draw.page(dashboard, shown, window, _NOTE))
    return made


def picture(page: Path, target: Path, height: int) -> bool:
    """A PNG of the page, or False where there is no Chromium."""
    binary = browser.find()
    if binary is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        size = f"--window-size={draw.WIDTH},{height}"
        shot = f"--screenshot={target.resolve()}"
        command = [binary, *browser.QUIET, *_STILL, f"--user-data-dir={profile}", size, shot, page.resolve().as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    return True


def main() -> None:
    """Record, draw, take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, default=Path("build/monitoring"), help="folder of the run")
    parser.add_argument("--images", type=Path, default=Path("docs/img"), help="where the PNGs go")
    arguments = parser.parse_args()
    folder, about = arguments.recording, arguments.recording / "recording.json"
    if about.exists():
        known = json.loads(about.read_text())
        with Prometheus(folder / "prometheus", {}) as prometheus:
            made = pages(prometheus, Window(*known["window"]), known["jobs"], folder / "pages")
    else:
        with recorded(folder, tell=print) as run:
            jobs = {name: run.job(name) for name in ("rounds", "site", "committee")}
            made = pages(run.prometheus, run.window, jobs, folder / "pages")
            about.write_text(json.dumps({"window": [run.window.start, run.window.end], "jobs": jobs}))
    for page in made:
        chart = next(HELM.glob(f"*/files/dashboards/{page.stem}.json"))
        target = arguments.images / f"dashboard-{page.stem}.png"
        print(page, "→", target if picture(page, target, draw.height_of(load(chart))) else "no Chromium, no picture")


if __name__ == "__main__":
    main()
