"""A sentence for the commonest failure of PEFT's loading: a file of another rank than the adapter in the model."""

import functools
from typing import Any

from peft import PeftModel


def explain_size_mismatch() -> None:
    """Let ``PeftModel.load_adapter`` say what to do about a size mismatch; the error stays a `RuntimeError`.

    Checkpoints of an adapter that started with an offset hold twice its rank. Trainers load them through PEFT into a
    model whose start was not repeated, and PEFT's error names two shapes and neither cause nor cure.
    """
    original = PeftModel.load_adapter
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, model_id, adapter_name, *args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise RuntimeError(
                f"size mismatch: the adapter in {model_id} has another rank than {adapter_name!r} of this model; "
                "if it was started by tangora.initialize, call that in the same way before resuming (its checkpoints "
                "hold twice the rank), or load it by tangora.load_adapter(base, path, is_trainable=True)"
            ) from error

    PeftModel.load_adapter = load_adapter
