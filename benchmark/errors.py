"""Errors for people: one line on stderr and an exit code, never a traceback."""

import argparse
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """Prints every default, takes no abbreviated flag, and refuses in one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str):
        raise UserError(message)


def run_main(main: Callable[[], int | None]) -> None:
    """Ends the process with what main returns, with 2 after the line of a UserError, or with 1 after an OSError's."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
