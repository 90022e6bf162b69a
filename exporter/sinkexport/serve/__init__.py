"""``sinkexport serve``: a bundle behind the OpenAI HTTP API."""
