"""The `kubernetes` lines of docs/operations.md, run as they stand; names, paths and numbers are this consortium's."""

import shlex
from pathlib import Path

from tests.support.documented import commands
from tests.support.kubernetes import Namespace, run
from tests.support.kubernetes_sites import CENTRE, Consortium

ROOT = Path(__file__).resolve().parents[2]
# What the guide calls a namespace is here one of these sites; its releases are called as the sites are.
SITES = {"centre": CENTRE, "pod-1": "ash", "alice": "alice"}
RELEASES = {"centre": CENTRE, "pod-1": "ash", "ward": "alice"}


class Guide:
    """Each line may be run as often as it is needed; `left` holds the lines that nobody has run."""

    def __init__(self, consortium: Consortium, spaces: dict[str, Namespace]) -> None:
        self._consortium = consortium
        self._spaces = spaces
        self._lines = commands(ROOT / "docs/operations.md", "kubernetes")
        self._run: set[int] = set()

    @property
    def left(self) -> list[str]:
        return [shlex.join(line) for number, line in enumerate(self._lines) if number not in self._run]

    def words(self, begins: str, *more: str, through: int | None = None) -> list[str]:
        """The one line that begins with these words and has `more` in it; `through` instead of the guide's target."""
        number = self._find(begins, more)
        self._run.add(number)
        return self._ours(self._lines[number], through)

    def run(self, begins: str, *more: str, through: int | None = None) -> str:
        """What that line says, which must succeed."""
        return run(*self.words(begins, *more, through=through), seconds=600)

    def _find(self, begins: str, more: tuple[str, ...]) -> int:
        found = [
            number
            for number, line in enumerate(self._lines)
            if shlex.join(line).startswith(begins) and all(word in shlex.join(line) for word in more)
        ]
        assert len(found) == 1, f"{begins} … {more}: {len(found)} lines of the guide"
        return found[0]

    def _ours(self, line: list[str], through: int | None) -> list[str]:
        site = SITES[line[line.index("--namespace") + 1]]
        space, files = self._spaces[site], self._files(site)
        words = []
        for before, word in zip(["", *line], line, strict=False):
            key, equals, value = word.partition("=")
            if before == "--namespace":
                words.append(space.name)
            elif word in RELEASES or word.removesuffix("-0") in RELEASES:
                release = word.removesuffix("-0")
                words.append(RELEASES[release] + word.removeprefix(release))
            elif key in ("plan.throughRound", "WARDROUND_THROUGH_ROUND") and through is not None:
                words.append(f"{key}={through}")
            elif equals and value in files:
                words.append(f"{key}={files[value]}")
            else:
                words.append(str(files.get(word, word)))
        if words[0] == "helm":
            words[0] = space.helm
            if not space.applies_server_side:
                words = [word for word in words if word != "--force-conflicts"]
        if words[1] == "install":
            words += ["-f", str(self._consortium.values(site))]
        return words

    def _files(self, site: str) -> dict[str, Path]:
        consortium = self._consortium
        guided = next(name for name, ours in SITES.items() if ours == site)
        folder = consortium.folder / site
        return {
            f"{guided}/secret.yaml": folder / "secret.yaml",
            f"{guided}/site.yaml": folder / "site.yaml",
            "pin.yaml": folder / "pin.yaml",
            "policy.yaml": folder / "policy.yaml",
            "charter.yaml": consortium.charter(1),
            "charter-2.yaml": consortium.charter(2),
            "charter.signatures.yaml": consortium.signatures(1),
            "study/study.yaml": consortium.path("first"),
            "next/study.yaml": consortium.path("second"),
            "deploy/helm/aggregator": ROOT / "deploy/helm/aggregator",
            "deploy/helm/keyshare": ROOT / "deploy/helm/keyshare",
            "deploy/helm/hospital-node": ROOT / "deploy/helm/hospital-node",
        }
