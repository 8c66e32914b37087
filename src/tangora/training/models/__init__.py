"""Base models: packaged, from a local folder or GGUF file, or from the hub."""

from tangora._names import KINDS, Kind
from tangora.training.models.images import ImageScaler
from tangora.training.models.loading import PACKAGED_MODELS, LoadedModel, load_model

__all__ = ["KINDS", "PACKAGED_MODELS", "ImageScaler", "Kind", "LoadedModel", "load_model"]
