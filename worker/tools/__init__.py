"""Tools that a model may call: Python functions, marked by `@tool`."""
