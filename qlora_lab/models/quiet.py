"""transformers without its progress bars and advice, while one of our own lines tells what is going on."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars and no advice from transformers while one of our own lines tells what is going on."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
