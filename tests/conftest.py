"""Asserts of the laws show their values when they fail."""

import pytest

pytest.register_assert_rewrite("laws")
