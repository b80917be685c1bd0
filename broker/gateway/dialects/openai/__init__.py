"""OpenAI Responses with background mode: a run as the response of an unmodified `openai` client."""
