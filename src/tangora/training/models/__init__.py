"""Base models: packaged, from a local folder or GGUF file, or from the hub."""

from tangora._names import KINDS, Kind
from tangora.training.models.base_model import PACKAGED_MODELS, LoadedModel, load_model
from tangora.training.models.image_scaler import ImageScaler

__all__ = ["KINDS", "PACKAGED_MODELS", "ImageScaler", "Kind", "LoadedModel", "load_model"]
