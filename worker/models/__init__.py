"""Models behind OpenAI-compatible servers: one interface, whichever API the server has."""
