"""The command's own image has no torch: what it imports at its start must not need it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "torchvision", "opacus")


def test_what_the_image_imports_does_without_torch() -> None:
    """The very line with which the image's build ends, where these packages cannot be imported."""
    imports = re.findall(r"-c '(import [^']+)'", (ROOT / "services/cli/Dockerfile").read_text())
    assert len(imports) == 1
    program = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); {imports[0]}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
