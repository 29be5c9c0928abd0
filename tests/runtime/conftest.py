"""A model for the engine that computes nothing."""

from __future__ import annotations

import pytest
from fake_model import FakeModel


@pytest.fixture
def fake() -> FakeModel:
    """A model that computes nothing."""
    return FakeModel()


@pytest.fixture(scope="session")
def fakes() -> type[FakeModel]:
    """The class, for several of them."""
    return FakeModel
