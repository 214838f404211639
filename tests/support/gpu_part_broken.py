"""A part whose module cannot be imported, as where a package is missing."""

import a_package_that_is_not_installed  # noqa: F401  # pyright: ignore[reportMissingImports]
