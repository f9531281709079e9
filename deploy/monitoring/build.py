"""What the charts carry: alert rules and dashboards, compiled."""

from pathlib import Path

from deploy.monitoring import committee, rounds, rules, site

DASHBOARDS = {"aggregator": ("rounds", rounds), "hospital-node": ("site", site), "keyshare": ("committee", committee)}
HELM = Path(__file__).parents[1] / "helm"


def compiled() -> dict[Path, str]:
    """Every made file with its content."""
    found = {HELM / chart / "files" / "rules.yaml": rules.compiled(chart) for chart in rules.RULES}
    for chart, (name, made) in DASHBOARDS.items():
        found[HELM / chart / "files" / "dashboards" / f"{name}.json"] = made.compiled()
    return found


def write() -> list[Path]:
    """Write what is not as it should be; the files that changed."""
    changed = []
    for path, text in compiled().items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed
