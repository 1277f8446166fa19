"""transformers without its progress bars and advice."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def quiet_transformers():
    """Switch off transformers' progress bars and advice for a while: a line of our own says what is going on."""
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
