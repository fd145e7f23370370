"""Build backend that builds nothing: the project runs from its checkout.

Its top-level folders (`datasets`, `models`, `utils`, ...) are the published repository's.
Installed, they would overwrite files of packages of the same names, Hugging Face `datasets` among
them.
"""

from typing import NoReturn

_REASON = (
    'k-SALSA runs from its checkout and is not installed: its folders would overwrite other '
    'packages (datasets, models, utils, ...). Install what it needs with "make env" or '
    '"pip install -r environment/requirements.txt" and run the scripts from here.'
)


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> NoReturn:
    raise SystemExit(_REASON)


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> NoReturn:
    raise SystemExit(_REASON)


build_editable = build_wheel
