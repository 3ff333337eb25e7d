"""The `rewire` command: one file a verb; no arithmetic here."""

import logging
import os
import sys

# before transformers is imported: its own bars and warnings are not ours
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Exit status: 0 done; 2 the input is wrong (one line says what); 3 interrupted; 1 a bug."""
    from ..kernels.errors import InputError
    from .app import app

    logging.basicConfig(format="rewire: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written, statistics that were collected are kept: run the command again", 3)
    except Exception as error:  # typer carries its own copy of click, so usage errors are known by what they can do
        if type(error).__name__ == "Abort":
            _fail("interrupted; nothing was written, statistics that were collected are kept: run the command again", 3)
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (see rewire --help)", 2)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"rewire: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
