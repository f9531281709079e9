"""Strict documents: frozen models over exact bytes; an unknown key is a refusal."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a document. Unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Document(Section):
    """A whole file; `wardround` names its kind and version."""
