"""Import and check of HAM10000 in its published layout: seconds for the pictures that are there.

    python bench/data.py --npz FILE --metadata FILE [--out build/bench/data.json]

The zips are made from the stored JPEGs first, outside the timing. Prints one JSON object.
"""

import argparse
import json
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from services.cli.data_check import check_folder
from services.cli.data_import import import_ham10000


def pack(npz: Path, metadata: Path, folder: Path) -> int:
    """Two zips of images and the table, as published; the number of images."""
    with np.load(npz, allow_pickle=False) as stored:
        blob, offsets, names = stored["blob"].tobytes(), stored["offsets"], stored["image_id"]
    for part in (1, 2):
        with zipfile.ZipFile(folder / f"HAM10000_images_part_{part}.zip", "w") as out:
            for i in range(part - 1, len(names), 2):
                out.writestr(f"{names[i]}.jpg", blob[offsets[i] : offsets[i + 1]])
    (folder / "HAM10000_metadata").write_bytes(metadata.read_bytes())
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--npz", type=Path, required=True)
    parser.add_argument("--metadata", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/bench/data.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archive, sites = Path(scratch, "archive"), Path(scratch, "sites")
        archive.mkdir()
        packed = pack(args.npz, args.metadata, archive)
        began = time.perf_counter()
        done = import_ham10000(archive, sites)
        imported = time.perf_counter() - began
        began = time.perf_counter()
        again = import_ham10000(archive, sites)
        repeated = time.perf_counter() - began
        began = time.perf_counter()
        reports = {path.parent.name: check_folder(path.parent) for path in done.tables}
        checked = time.perf_counter() - began
    found = {
        "images": packed,
        "imported": done.images,
        "rows_without_image": done.without_image,
        "written_again": again.written,
        "import_seconds": round(imported, 2),
        "second_import_seconds": round(repeated, 2),
        "check_seconds": round(checked, 2),
        "check_seconds_per_thousand": round(1000 * checked / packed, 2),
        "sites": {
            name: {
                "images": len(report.table.rows),
                "lesions": report.patients(),
                "passed": report.passed,
                "near_duplicates": sum(one.kind == "near duplicate" for one in report.findings),
                "classes": report.classes(),
            }
            for name, report in reports.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
