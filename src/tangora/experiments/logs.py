"""A run's log file: warnings and messages go there, so that the terminal shows progress only."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send log messages and Python warnings to a file while a run goes on."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("tangora", "py.warnings", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_default_handler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if logger.name == "tangora" else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
