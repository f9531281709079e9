"""ε over the rounds, from the ledgers that the hospitals exported: one function for report and view."""

from dataclasses import dataclass
from pathlib import Path

from services.cli.passport import SPLITS
from services.cli.run import Run
from services.hospital_node.events import Debit, LedgerEvent
from services.hospital_node.ledger import parse_export
from services.hospital_node.spending import Account


@dataclass(frozen=True)
class Spent:
    """One split of one site's data in one study: (round, ε after it), ascending; infinite where no noise was added.

    `solo`: the same at the noise of this hospital's own share, which holds even if all the others collude.
    """

    site: str
    split: str
    after: tuple[tuple[int, float], ...]
    solo: tuple[tuple[int, float], ...]

    @property
    def total(self) -> float:
        """ε of the whole study so far."""
        return self.after[-1][1]


def spent_by_round(run: Run) -> list[Spent]:
    """For every hospital that handed in its ledger, and every split that something left of. Raises MALFORMED."""
    found = []
    for folder in sorted(path for path in (run.evidence / "hospitals").glob("*") if path.is_dir()):
        found += _of_site(folder / "ledger.jsonl", folder.name, run.study.digest.hex())
    return found


def _of_site(ledger: Path, site: str, study: str) -> list[Spent]:
    events = [entry.parsed() for entry in parse_export(ledger.read_text().splitlines())]
    debits = [event for event in events if isinstance(event, Debit) and event.study == study]
    found = []
    for split in SPLITS:
        rounds = sorted({debit.round for debit in debits if debit.split == split})
        until = [(number, _account(events, study, number)) for number in rounds]
        if rounds:
            after = tuple((number, account.splits(study)[split]) for number, account in until)
            solo = tuple((number, account.splits(study, solo=True)[split]) for number, account in until)
            found.append(Spent(site, split, after, solo))
    return found


def _account(events: list[LedgerEvent], study: str, number: int) -> Account:
    """As it stood after round `number` of the study; a second attempt of a round that cost again counts with it."""
    return Account(
        event for event in events if not isinstance(event, Debit) or (event.study == study and event.round <= number)
    )
