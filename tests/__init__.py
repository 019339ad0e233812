"""A package, so that `from tests...` is not the `tests` of some other package that is installed."""
