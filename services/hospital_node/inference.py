"""The model in use: pixels in, class probabilities out, with everything between them in one network.

The same steps as in training and evaluation: normalised pixels, or features of the frozen backbone at length 1, then
the trained part; the temperature of the passport's calibration (Guo et al. 2017) divides the scores.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.common.documents.study import ModelSection
from services.common.errors import Reason, ServiceError
from services.hospital_node.architectures import build
from services.hospital_node.backbones import BACKBONES, load_backbone
from services.hospital_node.inputs import PIXEL_MEAN, PIXEL_SPREAD, unit_features
from services.hospital_node.models import layout, load_vector, read_model_file

OPSET = 18


class Classifier(nn.Module):
    """(n, 3, size, size) float32, RGB from 0 to 255 → (n, classes) probabilities."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        head: nn.Module,
        backbone: nn.Module | None,
        mean: Tensor,
        scale: Tensor,
        temperature: float,
        views: int = 1,
    ) -> None:
        super().__init__()
        self.head, self.backbone, self.views = head, backbone, views
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        values = (images - self.mean) / self.scale
        if self.backbone is not None:
            values = unit_features(self.backbone, values, self.views)
        return torch.softmax(self.head(values) / self.temperature, dim=1)


def open_classifier(model: ModelSection, file: Path, backbones: Path | None, temperature: float = 1.0) -> Classifier:
    """The network of `model` with the weights of the model file. Raises INVALID_DATA, INVALID_DOCUMENT, NOT_FOUND."""
    head = build(model)
    load_vector(head, read_model_file(file, layout(head)))
    if model.backbone is None:
        mean, scale = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_SPREAD))
        return _frozen(Classifier(head, None, mean, scale, temperature))
    kind = BACKBONES[model.backbone.name]
    mean, scale = (torch.full((1, 3, 1, 1), value) for value in (kind.pixel_mean, kind.pixel_scale))
    backbone = load_backbone(model.backbone, backbones)
    return _frozen(Classifier(head, backbone, mean, scale, temperature, model.backbone.views))


def probabilities(classifier: Classifier, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, classes) of (n, size, size, 3) RGB."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        found: NDArray[np.float64] = classifier(images).double().numpy()
    return found


def export_onnx(classifier: Classifier, size: int, out: Path, facts: dict[str, str]) -> None:
    """Write the network with its preprocessing as ONNX; `facts` become its metadata. Raises NOT_FOUND without onnx."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it and says so only later
    except ImportError as error:
        raise ServiceError(
            Reason.NOT_FOUND, f"--onnx needs {error.name}, which is not installed here: pip install 'wardround[onnx]'"
        ) from None
    example = torch.zeros(2, 3, size, size)
    program = torch.onnx.export(
        classifier,
        (example,),
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise ServiceError(Reason.INTERNAL, "torch made no ONNX program")
    model = program.model_proto
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    out.write_bytes(model.SerializeToString())


def export_torchscript(classifier: Classifier, size: int, out: Path, facts: dict[str, str]) -> None:
    """Write the network with its preprocessing as TorchScript, by tracing; `facts` travel as extra files."""
    with torch.inference_mode():
        traced = torch.jit.trace(classifier, torch.zeros(2, 3, size, size))  # type: ignore[no-untyped-call]  # torch has no types here
    torch.jit.save(traced, out, _extra_files=facts)


def _frozen(classifier: Classifier) -> Classifier:
    classifier.eval().requires_grad_(requires_grad=False)
    return classifier
