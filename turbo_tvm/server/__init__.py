"""The server: compiled models behind the protocols that clients already speak. `turbo-tvm serve`.

    client -> endpoints (kserve, openai, tei, operations) -> ModelService -> Engine -> CompiledModel

`app.py` puts it together. `endpoint.py` describes HTTP endpoints, `endpoint_app.py` answers their requests, `errors.py`
has each kind of failure with its form in each protocol, `serve.py` runs the server. Needs the extra `serve`.
"""
