"""The embedded engine and its server: the default on a machine without vLLM, and the reference for what vLLM must do."""
