"""Pictures of a ward as they come: whole, damaged, foreign and with names in them. Drawn, not photographed."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def texture(seed: int, size: int = 48) -> np.ndarray:
    """(size, size, 3) of low frequencies, another for each seed: perceptual hashes tell them apart."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, form, **options)
    return out.getvalue()


def sixteen_bits(pixels: np.ndarray) -> bytes:
    """A 16-bit grey PNG of the red channel."""
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    return out.getvalue()


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG whose header alone promises this many pixels; the file is a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def dicom(pixels: np.ndarray | None, *, frames: int = 1, patient: str = "", burnt: bool = False) -> bytes:
    """A secondary capture in explicit little endian; without pixels where None."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    data.Modality = "XC"
    if patient:
        data.PatientID, data.PatientName = patient, "Doe^Jane"
    if burnt:
        data.BurnedInAnnotation = "YES"
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelRepresentation = 7, 0
        if frames > 1:
            data.NumberOfFrames = frames
        data.PixelData = pixels.tobytes() * frames
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


def ward(folder: Path, rows: int = 6, head: str = "image_id,path,patient_id,label") -> Path:
    """A folder that passes: `rows` drawn pictures of two classes, one patient each."""
    (folder / "images").mkdir(parents=True)
    lines = [head]
    for i in range(rows):
        (folder / "images" / f"i{i}.png").write_bytes(encoded(texture(i)))
        lines.append(f"i{i},images/i{i}.png,p{i},{'nv' if i % 2 else 'mel'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
