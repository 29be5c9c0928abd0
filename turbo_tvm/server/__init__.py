"""The server: compiled models behind the protocols that clients already speak. `turbo-tvm serve`.

    client -> endpoints (kserve, openai, tei; kserve_grpc) -> ServedModel -> Engine -> CompiledModel

`app.py` puts it together, `endpoint.py` is what every HTTP endpoint shares, `errors.py` says what a failure looks like
in each protocol, `serve.py` runs it all. Needs the extra `serve`.
"""
