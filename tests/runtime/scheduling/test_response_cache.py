"""The response cache: keys, copies, and what is dropped."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from turbo_tvm.artifact.manifest import ImageSpec, PositionRule, RequestLimits
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.images import from_image
from turbo_tvm.runtime.model import ModelOutput
from turbo_tvm.runtime.scheduling.response_cache import ENTRY_BYTES, ResponseCache, own_copy, request_key
from turbo_tvm.runtime.validation import from_sequences


def request(ids, types=None):
    kinds = None if types is None else [types]
    return from_sequences([ids], kinds, RequestLimits(64, 1000, 2), PositionRule("arange"))


def test_keys_tell_requests_apart():
    asked = [
        (b"a", request([1, 2])),
        (b"b", request([1, 2])),
        (b"a", request([2, 1])),
        (b"a", request([1, 2, 0])),
        (b"a", request([1, 2], [0, 1])),
        (b"a", request([1], [0])),
        (b"a", request([1])),
    ]
    keys = [request_key(*pair) for pair in asked]
    assert len(set(keys)) == 6  # the last two are the same: token types are 0 by default
    assert keys[0] == request_key(b"a", request(np.array([1, 2], np.int64)))


def test_keys_tell_images_apart():
    spec = ImageSpec(1, 2, 2, 2, 2)
    black, white = np.zeros((1, 2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    keys = [request_key(b"a", from_image(image, spec)) for image in (black, white, black.copy())]
    assert keys[0] == keys[2] != keys[1] and len(keys[0]) < 64


def test_what_goes_in_and_out_is_a_copy():
    cache, answer = ResponseCache(1 << 20), np.arange(4.0)
    cache.put(b"k", answer)
    answer[0] = 9
    first = cache.get(b"k")
    first[1] = 9
    np.testing.assert_array_equal(cache.get(b"k"), [0, 1, 2, 3])
    assert cache.get(b"other") is None


def test_the_least_recently_used_goes_first():
    cache = ResponseCache(3 * (ENTRY_BYTES + 81))
    for name in (b"a", b"b", b"c"):
        cache.put(name, np.zeros(10))
    cache.get(b"a")
    cache.put(b"d", np.zeros(10))
    assert [cache.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.bytes_held <= cache.max_bytes and len(cache) == 3


def test_putting_again_replaces():
    cache = ResponseCache(1 << 20)
    cache.put(b"a", np.zeros(1000))
    cache.put(b"a", np.ones(10))
    assert cache.bytes_held == ENTRY_BYTES + 81 and len(cache) == 1
    cache.clear()
    assert cache.bytes_held == 0 and len(cache) == 0


@pytest.mark.parametrize("size", [0, 100])
def test_what_is_larger_than_the_cache_is_not_kept(size):
    cache = ResponseCache(size)
    cache.put(b"a", np.zeros(1000))
    assert cache.get(b"a") is None and cache.bytes_held == 0


def test_named_outputs_are_copied_each():
    answer = ModelOutput(start=np.zeros(3), end=np.ones(3))
    copy = own_copy(answer)
    copy["start"][0] = 5
    assert isinstance(copy, ModelOutput) and answer.start[0] == 0
    cache = ResponseCache(1 << 20)
    cache.put(b"a", answer)
    assert cache.bytes_held == ENTRY_BYTES + 49


def test_many_threads():
    cache = ResponseCache(20 * (ENTRY_BYTES + 81))

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(500):
            number = int(rng.integers(40))
            found = cache.get(bytes([number]))
            assert found is None or (found == number).all()
            cache.put(bytes([number]), np.full(10, float(number)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.bytes_held == len(cache) * (ENTRY_BYTES + 81) <= cache.max_bytes


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_a_size_is_a_number_of_bytes(wrong):
    with pytest.raises(InputError, match="bytes"):
        ResponseCache(wrong)
