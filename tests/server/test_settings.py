"""Settings travel to workers and back."""

from __future__ import annotations

from pathlib import Path

from turbo_tvm.server.settings import Settings


def test_there_and_back():
    settings = Settings(
        files=(Path("a.turbo"), Path("b.turbo")),
        grpc_port=1,
        max_tokens=5,
        api_keys=("k",),
        cors_origins=("*",),
        tls_cert=Path("c.pem"),
        models_dir=Path("m"),
    )
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(Settings(files=()).to_json()) == Settings(files=())
