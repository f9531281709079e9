"""Drawn, not photographed: small images that look a little like dermoscopy, for the demo and the tests.

Each site has its own camera (colour cast, light) and its own mix of classes, as real ones do. Nothing here is a
person's; every folder and every file says so. Not for medicine: the classes are caricatures.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

CLASSES = ("naevus", "melanoma", "keratosis", "vascular")
NOTICE = "Synthetic: drawn by Wardround, not photographed. It shows nobody and must not be used for medicine."

Float = NDArray[np.floating]
_OVERSAMPLING = 2
_SKIN = np.array([[0.93, 0.77, 0.68], [0.87, 0.67, 0.56], [0.76, 0.55, 0.43], [0.62, 0.42, 0.32]], np.float32)


@dataclass(frozen=True)
class Camera:
    """A site's habits: colour gains, brightness at the rim, hairs an image, and the share of each class."""

    gain: tuple[float, float, float]
    rim: float
    hairs: float
    mix: tuple[float, ...]


CAMERAS = (
    Camera((1.00, 1.00, 1.00), 0.95, 1.0, (0.34, 0.22, 0.24, 0.20)),
    Camera((1.04, 0.98, 0.91), 0.70, 0.3, (0.40, 0.18, 0.26, 0.16)),
    Camera((0.93, 0.97, 1.06), 0.90, 2.0, (0.26, 0.30, 0.24, 0.20)),
    Camera((0.97, 1.02, 0.96), 0.80, 0.6, (0.28, 0.22, 0.22, 0.28)),
)


@dataclass(frozen=True)
class _Look:
    """How lesions of a class are drawn; colours are RGB in 0..1, amounts have a spread of their own."""

    colours: tuple[tuple[float, float, float], ...]
    ragged: float
    patchy: float
    speckle: float
    edge: float


_LOOKS = (
    _Look(((0.46, 0.28, 0.17), (0.55, 0.36, 0.24)), 0.05, 0.25, 0.02, 0.10),
    _Look(((0.20, 0.13, 0.12), (0.44, 0.25, 0.17), (0.34, 0.32, 0.36)), 0.12, 0.85, 0.04, 0.13),
    _Look(((0.58, 0.44, 0.27), (0.50, 0.35, 0.20)), 0.09, 0.40, 0.13, 0.04),
    _Look(((0.66, 0.17, 0.19), (0.47, 0.12, 0.24)), 0.07, 0.55, 0.03, 0.08),
)


def write_site(folder: Path, camera: Camera, patients: int, image_size: int, seed: int) -> int:
    """Write images, metadata.csv and SYNTHETIC.md of one site; the number of images. The same seed, the same bytes.

    A patient has one lesion and one to three images of it.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", NOTICE)
    written = 0
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["image_id", "path", "patient_id", "label"])
        for patient in range(patients):
            label = int(generator.choice(len(CLASSES), p=camera.mix))
            views = int(generator.choice((1, 2, 3), p=(0.75, 0.2, 0.05)))
            for pixels in draw_patient(label, camera, image_size, views, generator):
                name = f"S{written:05d}"
                Image.fromarray(pixels).save(folder / "images" / f"{name}.png", pnginfo=note, compress_level=1)
                table.writerow([name, f"images/{name}.png", f"P{patient:04d}", CLASSES[label]])
                written += 1
    (folder / "SYNTHETIC.md").write_text(f"# Synthetic data\n\n{NOTICE}\n", encoding="utf-8")
    return written


def write_sites(folder: Path, names: tuple[str, ...], patients: int = 240, image_size: int = 28, seed: int = 1) -> None:
    """One folder for each name; the cameras repeat when there are more names than cameras."""
    for number, name in enumerate(names):
        write_site(folder / name, CAMERAS[number % len(CAMERAS)], patients, image_size, 1000 * seed + number)


def draw_patient(
    label: int, camera: Camera, image_size: int, views: int, generator: np.random.Generator
) -> list[NDArray[np.uint8]]:
    """`views` images (image_size, image_size, 3) of one lesion of class `label` on one skin."""
    look = _LOOKS[label]
    skin = _between(_SKIN, generator) + generator.normal(0, 0.02, 3)
    waves = generator.normal(0, look.ragged * generator.uniform(0.5, 1.5), (2, 5)) / np.sqrt(np.arange(1, 6))
    radius = generator.uniform(0.20, 0.38)
    stretch = generator.uniform(0.75, 1.0)
    colours = np.array(
        [np.array(c) * generator.uniform(0.8, 1.2) + generator.normal(0, 0.025, 3) for c in look.colours]
    )
    strength = generator.uniform(0.55, 1.0)
    images = []
    for _ in range(views):
        side = image_size * _OVERSAMPLING
        axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
        grid = np.stack(np.meshgrid(axis, axis, indexing="xy"))
        canvas = _skin(skin, grid, generator)
        mask, ripple = _lesion(grid, radius * np.array((1.0, stretch)), waves, look, generator)
        canvas += mask[..., None] * strength * (_paint(colours, look, side, ripple, generator) - canvas)
        _hairs(canvas, grid, generator.poisson(camera.hairs), generator)
        light = 1 - (1 - camera.rim) * (grid**2).sum(0) / 0.5
        canvas *= light[..., None] * np.array(camera.gain, np.float32) * generator.uniform(0.9, 1.08)
        small = canvas.reshape(image_size, _OVERSAMPLING, image_size, _OVERSAMPLING, 3).mean((1, 3))
        small += generator.normal(0, 0.015, small.shape)
        images.append((np.clip(small, 0, 1) * 255).round().astype(np.uint8))
    return images


def _between(colours: Float, generator: np.random.Generator) -> Float:
    """A colour somewhere along the row of colours, the light ones more often."""
    place = generator.beta(1.2, 2.0) * (len(colours) - 1)
    low = int(place)
    part = place - low
    return np.asarray(colours[low] * (1 - part) + colours[min(low + 1, len(colours) - 1)] * part)


def _skin(tone: Float, grid: Float, generator: np.random.Generator) -> Float:
    """Tone with a gradient in a random direction and soft blotches."""
    slope = generator.normal(0, 0.08, 2)
    shade = 1 + slope[0] * grid[0] + slope[1] * grid[1] + 0.03 * _clouds(grid.shape[1], 6, generator)
    return np.asarray(tone * shade[..., None])


def _lesion(
    grid: Float, radii: Float, waves: Float, look: _Look, generator: np.random.Generator
) -> tuple[Float, Float]:
    """How much lesion there is at each pixel (0..1), and its distance from the middle in radii; turned at random."""
    turn = generator.uniform(0, 2 * np.pi)
    x, y = grid - generator.normal(0, 0.05, (2, 1, 1))
    u = (x * np.cos(turn) + y * np.sin(turn)) / radii[0]
    v = (y * np.cos(turn) - x * np.sin(turn)) / radii[1]
    angle = np.arctan2(v, u)
    rim = np.full_like(angle, 1.0)
    for k, (cosine, sine) in enumerate(waves.T, start=2):
        rim += cosine * np.cos(k * angle) + sine * np.sin(k * angle)
    distance = np.hypot(u, v) / generator.uniform(0.92, 1.08) / np.clip(rim, 0.4, 1.8)
    return 1 / (1 + np.exp(np.clip((distance - 1) / look.edge * 3, -30, 30))), distance


def _paint(colours: Float, look: _Look, side: int, distance: Float, generator: np.random.Generator) -> Float:
    """The lesion's colours in patches, a darker middle, and light and dark specks."""
    out = np.broadcast_to(colours[0], (side, side, 3))
    for colour in colours[1:]:
        share = 1 / (1 + np.exp(-6 * (look.patchy * _clouds(side, 4, generator) + 0.4 * (distance - 0.8))))
        out = out + (share * min(1.0, look.patchy + 0.3))[..., None] * (colour - out)
    specks = _clouds(side, side // 3, generator)
    return np.asarray(out * (1 + look.speckle * specks)[..., None])


def _clouds(side: int, cells: int, generator: np.random.Generator) -> Float:
    """(side, side) smooth noise of spread about 1 with about `cells` bumps along a side."""
    grid = generator.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32)
    place = np.linspace(0, cells, side, endpoint=False, dtype=np.float32)
    low = place.astype(np.int64)
    part = place - low
    part = part * part * (3 - 2 * part)
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    smooth = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return np.asarray(smooth * 1.3)


def _hairs(canvas: Float, grid: Float, count: int, generator: np.random.Generator) -> None:
    """Draw `count` bent dark hairs over the canvas."""
    x, y = grid
    for _ in range(count):
        turn, offset, bend = generator.uniform(0, np.pi), generator.uniform(-0.4, 0.4), generator.normal(0, 0.5)
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        thick = generator.uniform(0.006, 0.013)
        hair = np.exp(-(((v - offset - bend * u * u) / thick) ** 2))
        canvas *= 1 - 0.65 * hair[..., None]
