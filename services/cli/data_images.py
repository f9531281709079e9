"""One picture of the ward: whether it can be used, and what it is. JPEG, PNG and DICOM.

Rules: a header is judged before any pixel is decoded, so a decompression bomb costs nothing; the values of
identifying fields are never read into a finding, only the fields' names; nothing here writes.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from services.cli.data_findings import Finding, Kind
from services.hospital_node.dataset import eight_bits

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".dcm": "DICOM"}
MOST_PIXELS = 100_000_000  # of one image; a dermoscope has about 12 million
THUMBNAIL = 96

# DICOM PS3.15 table E.1-1 names hundreds of attributes to remove; these are the ones that name a person or a place.
_NAMING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs",
    "OtherPatientNames", "PatientMotherBirthName", "PatientComments", "AccessionNumber", "ReferringPhysicianName",
    "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "InstitutionName", "InstitutionAddress",
)  # fmt: skip
_EXIF_NAMING = (
    ExifTags.Base.Artist, ExifTags.Base.CameraOwnerName, ExifTags.Base.ImageDescription, ExifTags.Base.XPAuthor,
    ExifTags.Base.XPComment, ExifTags.Base.XPTitle, ExifTags.Base.Copyright, ExifTags.Base.UserComment,
)  # fmt: skip


@dataclass(frozen=True)
class Looked:
    """What one usable picture is. `hash` is a 64-bit perceptual hash (pHash, Zauner 2010), for this site alone."""

    name: str
    sha256: bytes
    format: str
    width: int
    height: int
    colours: str  # Pillow's mode, or DICOM's photometric interpretation
    mean: tuple[float, float, float]
    spread: tuple[float, float, float]
    hash: int


class Unusable(Exception):  # noqa: N818  # it is a verdict on a picture, not a fault of the program
    """A picture that cannot be used, with why."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def look(folder: Path, name: str) -> tuple[Looked | None, list[Finding]]:
    """Read one picture whole. Never raises for a bad picture: it becomes a finding."""
    findings: list[Finding] = []
    try:
        blob = (folder / name).read_bytes()
        if not blob:
            raise Unusable(Kind.EMPTY, "the file has no bytes")
        pixels, form, colours, notes = decode(blob)
    except OSError as error:
        return None, [Finding(Kind.UNREADABLE, (name,), f"it cannot be read ({error.strerror})")]
    except Unusable as why:
        return None, [Finding(why.kind, (name,), why.detail)]
    findings += [Finding(kind, (name,), detail) for kind, detail in notes]
    height, width = pixels.shape[:2]
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX), np.float64).reshape(-1, 3)
    mean, spread = small.mean(axis=0), small.std(axis=0)
    return (
        Looked(
            name=name,
            sha256=hashlib.sha256(blob).digest(),
            format=form,
            width=width,
            height=height,
            colours=colours,
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            spread=(float(spread[0]), float(spread[1]), float(spread[2])),
            hash=_perceptual_hash(pixels),
        ),
        findings,
    )


def decode(blob: bytes) -> tuple[NDArray[np.uint8], str, str, list[tuple[Kind, str]]]:
    """(height, width, 3) RGB, the format, the colours, and what a person should know. Raises Unusable."""
    return _decode_dicom(blob) if is_dicom(blob) else _decode_picture(blob)


def is_dicom(blob: bytes) -> bool:
    """By its preamble (DICOM PS3.10 §7.1)."""
    return blob[128:132] == b"DICM"


def _decode_picture(blob: bytes) -> tuple[NDArray[np.uint8], str, str, list[tuple[Kind, str]]]:
    notes: list[tuple[Kind, str]] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, and lower
            image = Image.open(io.BytesIO(blob), formats=("JPEG", "PNG"))
        with image:
            _check_size(*image.size)
            form, mode = str(image.format), image.mode
            if getattr(image, "n_frames", 1) > 1:
                raise Unusable(Kind.FRAMES, f"it holds {getattr(image, 'n_frames', 0)} frames")
            naming = _names_in(image)
            pixels = np.asarray(eight_bits(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError:
        raise Unusable(Kind.TOO_LARGE, _too_many()) from None
    except UnidentifiedImageError:
        raise Unusable(Kind.UNREADABLE, "it is no JPEG, PNG or DICOM image") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        kind = Kind.TRUNCATED if "truncated" in str(error).lower() else Kind.UNREADABLE
        raise Unusable(kind, f"it cannot be decoded ({error})") from None
    if mode not in ("RGB", "L"):
        notes.append((Kind.DEPTH, f"its colours are stored as {mode}, which is turned into 8-bit RGB"))
    if naming:
        notes.append((Kind.IDENTIFYING, f"it carries {', '.join(naming)}"))
    return pixels, form, mode, notes


def _names_in(image: Image.Image) -> list[str]:
    """Names of the fields that may hold a person's name or a place; never their values."""
    exif = image.getexif()
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    found = [f"EXIF {tag.name}" for tag in _EXIF_NAMING if exif.get(tag) or inner.get(tag)]
    if exif.get_ifd(ExifTags.IFD.GPSInfo):
        found.append("EXIF GPSInfo")
    return found + [f"PNG text {key!r}" for key in sorted(getattr(image, "text", {}))]


def _decode_dicom(blob: bytes) -> tuple[NDArray[np.uint8], str, str, list[tuple[Kind, str]]]:
    import pydicom
    from pydicom.errors import InvalidDicomError

    notes: list[tuple[Kind, str]] = []
    try:
        dataset = pydicom.dcmread(io.BytesIO(blob))
        if "PixelData" not in dataset:
            raise Unusable(Kind.NO_PIXELS, "this DICOM object holds no pixels")
        _check_size(int(dataset.Columns), int(dataset.Rows))
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames > 1:
            raise Unusable(Kind.FRAMES, f"this DICOM object holds {frames} frames")
        pixels = _dicom_pixels(dataset)
    except InvalidDicomError as error:
        raise Unusable(Kind.UNREADABLE, f"it is no valid DICOM file ({error})") from None
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, EOFError, OSError, KeyError) as error:
        # pydicom and its decoders raise all of these for a damaged or foreign object
        kind = Kind.TRUNCATED if "truncated" in str(error).lower() or "less than" in str(error) else Kind.UNREADABLE
        raise Unusable(kind, f"its pixels cannot be decoded ({' '.join(str(error).split())[:200]})") from None
    naming = [word for word in _NAMING if str(dataset.get(word, "") or "").strip()]
    if naming:
        notes.append((Kind.IDENTIFYING, f"DICOM fields {', '.join(naming)} are filled"))
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        notes.append((Kind.BURNT_IN, "its BurnedInAnnotation says that text stands in the picture"))
    return pixels, "DICOM", str(dataset.PhotometricInterpretation), notes


def _dicom_pixels(dataset: Any) -> NDArray[np.uint8]:
    """(height, width, 3) RGB of one frame; grey of more than 8 bits is windowed by its own least and greatest value."""
    from pydicom.pixels.processing import apply_color_lut, convert_color_space

    photometric = str(dataset.PhotometricInterpretation)
    pixels = dataset.pixel_array
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    elif photometric.startswith("YBR") and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        pixels = convert_color_space(pixels, photometric, "RGB")
    if pixels.dtype != np.uint8:
        low, high = int(pixels.min()), int(pixels.max())
        pixels = ((pixels.astype(np.float64) - low) * (255 / max(1, high - low))).round().astype(np.uint8)
    if photometric == "MONOCHROME1":
        pixels = 255 - pixels
    return np.ascontiguousarray(np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., :3])


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise Unusable(Kind.TOO_LARGE, f"its header says {width} x {height} pixels, {_too_many()}")


def _too_many() -> str:
    return f"at most {MOST_PIXELS // 1_000_000} million are read"


def _perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    import imagehash

    bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    return int(np.packbits(bits).view(">u8")[0])


def thumbnail(folder: Path, name: str) -> bytes | None:
    """A JPEG of at most THUMBNAIL pixels a side; None where the picture cannot be drawn."""
    try:
        image = Image.fromarray(decode((folder / name).read_bytes())[0])
    except (OSError, Unusable):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
