"""API keys, as HTTP and gRPC clients send them: `authorization: Bearer KEY`, or `api-key: KEY`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence


def is_allowed(keys: Sequence[bytes], authorization: bytes, api_key: bytes) -> bool:
    """Return whether the values of these two headers hold one of the keys; without keys everybody is allowed.

    Every key is compared, in constant time.
    """
    scheme, _, given = authorization.partition(b" ")
    key = (given if scheme.lower() == b"bearer" else api_key).strip()
    return not keys or any([hmac.compare_digest(key, known) for known in keys])
