"""Drawn data: in the real format, said to be drawn, the same for the same seed, and learnable."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from services.cli.synthetic import CLASSES, NOTICE, write_sites
from services.hospital_node.dataset import SPLITS, load_dataset


def test_sites_are_in_the_format_of_a_hospital(tmp_path: Path) -> None:
    write_sites(tmp_path, ("north", "south"), patients=40)
    for name in ("north", "south"):
        data = load_dataset(tmp_path / name, CLASSES, 28, tmp_path / f"{name}-state")
        data.check_images()
        assert data.unit == "patient"
        assert sum(len(data.fold(split)) for split in SPLITS) == 40
        assert len(data) > 40  # some have more than one image
        assert set(data.labels.tolist()) == set(range(len(CLASSES)))


def test_every_file_says_that_it_is_drawn(tmp_path: Path) -> None:
    write_sites(tmp_path, ("north",), patients=5)
    assert NOTICE in (tmp_path / "north" / "SYNTHETIC.md").read_text()
    for path in (tmp_path / "north" / "images").iterdir():
        with Image.open(path) as image:
            assert image.info["Comment"] == NOTICE
            assert image.size == (28, 28)


def test_same_seed_same_bytes_and_sites_differ(tmp_path: Path) -> None:
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sites(tmp_path / run, ("north", "south"), patients=4, seed=seed)

    def pixels(run: str, site: str) -> bytes:
        return b"".join(np.asarray(Image.open(p)).tobytes() for p in sorted((tmp_path / run / site).glob("images/*")))

    assert pixels("a", "north") == pixels("b", "north")
    assert pixels("a", "north") != pixels("c", "north")
    assert pixels("a", "north") != pixels("a", "south")
    rows = [list(csv.reader((tmp_path / run / "north" / "metadata.csv").open())) for run in "ab"]
    assert rows[0] == rows[1]
