"""Keys: which headers of a request let it in."""

from __future__ import annotations

import pytest

from turbo_tvm.server.auth import is_allowed


@pytest.mark.parametrize(
    ("authorization", "api_key", "allowed"),
    [
        (b"Bearer secret", b"", True),
        (b"bearer  secret ", b"", True),
        (b"", b"secret", True),
        (b"Basic x", b"second", True),
        (b"Bearer wrong", b"secret", False),  # a bearer's key is the one that counts
        (b"secret", b"", False),
        (b"Bearer", b"", False),
        (b"", b"", False),
        (b"Bearer \xff\xfe", b"", False),
    ],
)
def test_a_key_in_either_header(authorization, api_key, allowed):
    assert is_allowed([b"secret", b"second"], authorization, api_key) == allowed


def test_without_keys_everybody_is_allowed():
    assert is_allowed([], b"", b"")
