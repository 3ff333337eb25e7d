"""The `rewire` command: one file a verb; no arithmetic here."""

import logging
import os
import sys

# before transformers is imported: its own bars and warnings are not ours
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


INTERRUPTED = (
    "interrupted; no results were written. Given again, the same command goes on: statistics from their last "
    "checkpoint, if any, values and answers from those that are on disk"
)

CTRL_C = 130  # what typer makes of a KeyboardInterrupt; older ones raise Abort


def main() -> None:
    """Exit status: 0 done; 2 the input is wrong (one line says what); 3 interrupted; 1 a bug."""
    from ..kernels.errors import InputError
    from .app import app

    _say_warnings()
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        _fail(INTERRUPTED, 3)
    except Exception as error:  # typer carries its own copy of click, so usage errors are known by their names
        if type(error).__name__ == "Abort":
            _fail(INTERRUPTED, 3)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(2)
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        _fail(f"{error.format_message()} (see {context.command_path if context else 'rewire'} --help)", 2)
    if status == CTRL_C:
        _fail(INTERRUPTED, 3)
    sys.exit(status if isinstance(status, int) else 0)


def _say_warnings() -> None:
    """Ours go to stderr, a line each; other libraries' are theirs to print."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("rewire: %(message)s"))
    log = logging.getLogger("rewire")
    log.handlers = [handler]
    log.propagate = False


def _fail(message: str, status: int) -> None:
    print(f"rewire: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
