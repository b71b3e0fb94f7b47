"""The real data sets that some tests need, where they lie beside the project: see WMTP_DATA."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("WMTP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip where DATA holds no such folder: a fresh clone alone has none of the data sets."""
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"no {DATA / folder}; set WMTP_DATA to its parent")
