"""Environment variables that turn something on or off."""

import os


def switch(name: str, default: bool) -> bool:
    """Read a variable that is 0 or 1; `default` is for one that is not set or empty.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get(name) or str(int(default))
    if value not in ("0", "1"):
        raise ValueError(f"environment variable {name} must be 0 or 1, got {value!r}")
    return value == "1"
