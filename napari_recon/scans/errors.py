"""The one exception that a person is meant to read."""


class ScanError(ValueError):
    """Bad input: one sentence that says which file or field, what is wrong, and what to do.

    The command line prints it and exits 2; the docks show it as a napari notification. Nothing else is shown, so the
    sentence has to stand alone.
    """
