"""A headless Chromium, where one is installed: prints a page to PDF, takes its picture. Never fetched or updated."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from services.common.errors import Reason, ServiceError

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",  # the page is ours, has no script and may load nothing
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SECONDS = 120


def find() -> str | None:
    """The path of Chromium or Chrome, or None. WARDROUND_CHROMIUM names another one."""
    named = os.environ.get("WARDROUND_CHROMIUM", "")
    return next(filter(None, map(shutil.which, (named, *_NAMES) if named else _NAMES)), None)


def print_pdf(page: Path, out: Path) -> None:
    """Print an HTML file to a PDF. Raises NOT_FOUND without Chromium, INTERNAL where it fails."""
    chromium = find()
    if chromium is None:
        raise ServiceError(
            Reason.NOT_FOUND,
            f"--pdf needs Chromium or Chrome, and none is on the path: install it, or open {page} and print it",
        )
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *QUIET, f"--user-data-dir={profile}", "--no-pdf-header-footer"]
        command += [f"--print-to-pdf={out.resolve()}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise ServiceError(
                Reason.INTERNAL, f"{chromium} did not print {page} within {_SECONDS} s: open it and print it by hand"
            ) from None
    if done.returncode != 0 or not out.exists():
        words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ServiceError(Reason.INTERNAL, f"{chromium} did not print {page} ({words}): open it and print it by hand")
