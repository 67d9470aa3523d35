"""Parser for the options of scripts: errors are raised, and --help states every default."""

import argparse
from typing import NoReturn


class RaisingParser(argparse.ArgumentParser):
    """Parser that raises ValueError instead of exiting, so that all ranks can report one error.

    Takes no abbreviations of options, which a later option could make ambiguous.
    """

    def __init__(self, script: str, description: str) -> None:
        super().__init__(
            prog=script,
            description=description,
            formatter_class=DefaultsFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class DefaultsFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds each option's default to its help, unless the help states one itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if not text or text == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            return text
        if "default" in text:
            return text
        # argparse would print None, False and True.
        words = [(None, "none"), (False, "off"), (True, "on")]
        default = next((word for value, word in words if action.default is value), "%(default)s")
        return f"{text} (default: {default})"
