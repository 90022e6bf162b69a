"""The OpenAI HTTP API over a bundle: conversations that go on for ever, on the streams of one session."""
