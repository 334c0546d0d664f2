"""The fixture that judges a mixer by its oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from agreement import Agreement


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Agreement:
    return Agreement(record_property)
