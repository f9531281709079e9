"""Real processes of a federation on this machine: started, watched, killed, stopped."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import Reason, ServiceError


@dataclass
class Service:
    """One process of a role; `module` is run as `python -m MODULE --config CONFIG`."""

    name: str
    module: str
    config: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its output goes to the end of `log`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--config", str(self.config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """kill −9, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM) without waiting."""
        if self.running and self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait for its end; kill −9 what has not ended by then."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def last_words(self, lines: int = 5) -> str:
        """The end of its log, for an error message."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def stop_all(services: list[Service], seconds: float = 15) -> None:
    """SIGTERM to all at once, then wait; kill −9 whoever is left."""
    for service in services:
        service.terminate()
    ends = time.monotonic() + seconds
    for service in services:
        service.wait(max(0.1, ends - time.monotonic()))


def wait_for_file(path: Path, service: Service, seconds: float) -> str:
    """The content of `path` once `service` has written it. Raises UNREACHABLE with the service's last words."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if path.exists() and (text := path.read_text().strip()):
            return text
        if not service.running:
            raise ServiceError(
                Reason.UNREACHABLE,
                f"{service.name} ended at its start; its log {service.log} says:\n{service.last_words()}",
            )
        time.sleep(0.02)
    raise ServiceError(
        Reason.UNREACHABLE,
        f"{service.name} did not write {path} within {seconds:.0f} s; its log {service.log} says:\n"
        + service.last_words(),
    )
